//! Scripts at a node of a Redis Cluster that gives the keys of their slot away, one by one: nothing is done in part.

use crate::support::{
    eventually,
    redis_server::{Answer, Options, RedisServer, free_port},
};

#[tokio::test]
async fn a_publish_whose_keys_move_does_nothing() {
    let nodes = Nodes::start().await;
    let keys = ["{c}:log", "{c}:head", "{c}:ids", "{c}:ids:old"];
    let call = |id| {
        let words = ["EVAL", PUBLISH, "1", "{c}:log", "c", "x", "2", "1000", "64000", id];
        words.map(str::to_owned).to_vec()
    };
    // The third id begins the second generation of the index.
    let made: Vec<_> = ["a", "b", "c", "d"].map(call).to_vec();
    nodes.refuses_untouched(&keys, &made, &call("e"));
    let keys = ["{ws}:user:u:log", "{ws}:user:u:head", "{ws}:clock"];
    let call = |id| {
        let words =
            ["EVAL", PUBLISH, "2", keys[0], keys[2], "ws:user:u", "x", "9", "9", "64000", id];
        words.map(str::to_owned).to_vec()
    };
    nodes.refuses_untouched(&keys, &[call("a"), call("b")], &call(""));
}

#[tokio::test]
async fn a_token_stream_whose_keys_move_does_not_change() {
    let nodes = Nodes::start().await;
    let key = |what: &str| format!("{{s}}:{what}");
    let call = |op: &str, name: &str, rest: &[&str]| {
        let (state, text) = (key(&format!("stream:{name}")), key(&format!("stream:{name}:text")));
        let (log, index) = (key("log"), key("streams"));
        let mut words = vec!["EVAL", STREAM, "4", &log, &state, &text, &index, op, "s", name];
        words.extend(["1000", "100000", "64000", "1"].iter().chain(rest));
        words.into_iter().map(str::to_owned).collect::<Vec<_>>()
    };
    let keys = ["log", "head", "stream:t", "stream:t:text", "streams"].map(key);
    let keys = keys.each_ref().map(String::as_str);
    let made = [call("open", "t", &["{}"]), call("append", "t", &["a", "1"])];
    nodes.refuses_untouched(&keys, &made, &call("append", "t", &["b", "2"]));
    nodes.refuses_untouched(&keys, &made, &call("end", "t", &["finish", ""]));
    // The oldest of sixteen gives way.
    let names: Vec<_> = (0..16).map(|n| format!("n{n}")).collect();
    let made: Vec<_> = names.iter().map(|name| call("open", name, &["{}"])).collect();
    let keys = ["log", "head", "stream:n0", "stream:n0:text", "streams"].map(key);
    let open = call("open", "t", &["{}"]);
    nodes.refuses_untouched(&keys.each_ref().map(String::as_str), &made, &open);
}

/// Two nodes; the first has all slots.
struct Nodes {
    here: RedisServer,
    there: RedisServer,
}

impl Nodes {
    async fn start() -> Self {
        let ((here, _), (there, bus)) = (node(), node());
        here.call(&["CLUSTER", "ADDSLOTSRANGE", "0", "16383"]);
        here.call(&["CLUSTER", "MEET", "127.0.0.1", &there.port().to_string(), &bus]);
        for node in [&here, &there] {
            eventually("the nodes know each other", || {
                let told = text(node.call(&["CLUSTER", "INFO"]));
                told.contains("cluster_state:ok") && told.contains("cluster_known_nodes:2")
            })
            .await;
        }
        Self { here, there }
    }

    /// Makes a call once for each key, while that key is at the other node, and asserts that no other key changes.
    fn refuses_untouched(&self, keys: &[&str], made: &[Vec<String>], call: &[String]) {
        let Self { here, there } = self;
        let words = |call: &[String]| {
            let words: Vec<_> = call.iter().map(String::as_str).collect();
            here.try_call(&words).unwrap()
        };
        let slot = here.call(&["CLUSTER", "KEYSLOT", keys[0]]).integer().to_string();
        let [id_here, id_there] = [here, there].map(|node| text(node.call(&["CLUSTER", "MYID"])));
        let port = there.port().to_string();
        for moved in keys {
            let answers: Vec<_> = made.iter().map(|call| words(call)).collect();
            assert!(
                !answers.iter().any(|answer| matches!(answer, Answer::Error(_))),
                "{answers:?}"
            );
            there.call(&["CLUSTER", "SETSLOT", &slot, "IMPORTING", &id_here]);
            here.call(&["CLUSTER", "SETSLOT", &slot, "MIGRATING", &id_there]);
            let outcome = here.call(&["MIGRATE", "127.0.0.1", &port, moved, "0", "5000"]);
            assert_eq!(outcome, Answer::Text("OK".into()), "{moved}");
            let values = || {
                let rest = keys.iter().filter(|key| *key != moved);
                rest.map(|key| here.call(&["DUMP", key])).collect::<Vec<_>>()
            };
            let before = values();
            let answer = words(call);
            assert!(matches!(answer, Answer::Error(_)), "{moved} has moved: {answer:?}");
            assert_eq!(values(), before, "{moved} has moved");
            for node in [here, there] {
                node.call(&["CLUSTER", "SETSLOT", &slot, "STABLE"]);
            }
            here.call(&["FLUSHALL"]);
            there.call(&["FLUSHALL"]);
        }
    }
}

/// Starts a node, and returns the port at which other nodes reach it.
fn node() -> (RedisServer, String) {
    let bus = free_port().to_string();
    let arguments =
        ["--cluster-enabled", "yes", "--cluster-port", &bus].map(str::to_owned).to_vec();
    (RedisServer::start_with(Options { arguments, ..Options::default() }), bus)
}

fn text(answer: Answer) -> String {
    let Answer::Text(text) = answer else { panic!("{answer:?}") };
    text
}

const PUBLISH: &str = include_str!("../../../../spec/scripts/publish.lua");
const STREAM: &str = include_str!("../../../../spec/scripts/stream.lua");
