//! `wsproxy agent`: the keys of `[tunnel_agent]` from file, environment and flags.

use crate::{file, stderr, stdout, wsproxy};

#[test]
fn an_agent_without_its_settings_exits_with_78() {
    let (_folder, path) =
        file("[tunnel_agent]\ncluster = \"c1\"\nupstream = \"http://127.0.0.1:1\"\n");
    let gateway = ("WSPROXY_TUNNEL_AGENT__GATEWAY", "ws://192.0.2.1");
    for (args, env, problem) in [
        (&["agent"][..], vec![], "tunnel_agent.cluster: is missing"),
        (&["agent", "-c", &path], vec![], "tunnel_agent.gateway: is missing"),
        (&["agent", "-c", &path], vec![gateway], "tunnel_agent.gateway: ws:// is not encrypted"),
        (
            &["agent", "-c", &path, "--allow-insecure", "true"],
            vec![gateway],
            "tunnel_agent.token_file: there is no token for the gateway",
        ),
        (&["agent", "--health-interval", "x"], vec![], "tunnel_agent.health_interval"),
    ] {
        let output = wsproxy(args, &env);
        assert_eq!(output.status.code(), Some(78), "{}", stderr(&output));
        assert!(stderr(&output).contains(problem), "{}", stderr(&output));
    }
    assert_eq!(wsproxy(&["agent", "--token", "t"], &[]).status.code(), Some(64));
    assert_eq!(wsproxy(&["serve", "--upstream", "http://a"], &[]).status.code(), Some(64));
}

#[test]
fn the_variable_of_a_token_file_is_that_of_its_key() {
    let name = "WSPROXY_TUNNEL_AGENT__TOKEN_FILE";
    let output = wsproxy(&["config", "show"], &[(name, "/no/such/file")]);
    assert!(output.status.success(), "{}", stderr(&output));
    assert!(stdout(&output).contains("token_file = \"/no/such/file\""), "{}", stdout(&output));
}
