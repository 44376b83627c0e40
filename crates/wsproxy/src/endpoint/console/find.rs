//! A subject on all instances: where it is connected, and why it is not.

use serde_json::{Value, json};
use wsproxy_proto::names::Id;

use crate::{
    core::Core,
    endpoint::{
        agents,
        console::{
            Console,
            ask::Answers,
            reach::{self, ROWS_MAX, Subject},
        },
        rooms,
    },
    http::{handshake, rejection::Rejection},
};

/// Looks for a subject here, at the other instances, and in the registry for those that do not answer.
pub(super) async fn find(console: &Console, core: &Core, subject: &Subject) -> Value {
    let asking = async {
        match &console.asker {
            Some(asker) => asker.ask(core, subject).await,
            None => Answers { answers: Vec::new(), asked: Some(0) },
        }
    };
    let (Answers { answers, asked }, registered) =
        tokio::join!(asking, registered(console, core, subject));
    let mut notes = Vec::new();
    match asked {
        None => notes.push(
            "Redis did not take the question to the other instances: only this one answered."
                .to_owned(),
        ),
        Some(asked) if asked > answers.len() as u64 => {
            let missing = asked - answers.len() as u64;
            notes.push(format!("{missing} of the other instances did not answer in time."));
        }
        Some(_) => {}
    }
    let all: Vec<_> =
        [reach::look(core, &console.families, subject)].into_iter().chain(answers).collect();
    if all.iter().any(|answer| answer["truncated"] == true) {
        notes.push(format!(
            "An instance has more than {ROWS_MAX} connections of it: the first are shown."
        ));
    }
    let rows = |name: &str| -> Vec<Value> {
        all.iter().filter_map(|one| one[name].as_array()).flatten().cloned().collect()
    };
    let mut connections = rows("connections");
    match registered {
        Ok(registered) => {
            // Instances that answered know their own connections better than the registry.
            let is_heard = |row: &Value| all.iter().any(|one| one["server_id"] == row["server_id"]);
            connections.extend(registered.into_iter().filter(|row| !is_heard(row)));
        }
        Err(rejection) => notes.push(format!(
            "The registry cannot be read, so other instances may have more: {}",
            rejection.message
        )),
    }
    let newest = |name: &str| {
        let mut rows = rows(name);
        rows.sort_by(|a, b| b["at"].as_str().cmp(&a["at"].as_str()));
        rows.truncate(ROWS_MAX);
        rows
    };
    let (kind, id) = subject.parts();
    json!({
        "kind": kind,
        "id": id,
        "instances": all.iter().map(|one| one["server_id"].clone()).collect::<Value>(),
        "notes": notes,
        "connections": connections,
        "ends": newest("ends"),
        "refusals": newest("refusals"),
    })
}

/// Returns the connections of a subject in the registry of all instances. Sessions are in none.
async fn registered(
    console: &Console,
    core: &Core,
    subject: &Subject,
) -> Result<Vec<Value>, Rejection> {
    let families = &console.families;
    let of_family = |family: &str, mut row: Value| {
        row["endpoint"] = family.into();
        row
    };
    match subject {
        Subject::User(user) => {
            let mut all = Vec::new();
            if let Some(registry) = &families.events.registry {
                let found =
                    handshake::deadline(core, async { Ok(registry.connections_of(user).await?) });
                for presence in found.await? {
                    let mut row = of_family("events", json!(presence));
                    row["since"] = row["connected_at"].take();
                    row["user_id"] = user.as_str().into();
                    all.push(row);
                }
            }
            all.extend(of_agent(console, core, user).await?);
            Ok(all)
        }
        Subject::Room(room) if core.config.endpoints.rooms => {
            let members = rooms::api::list_members(&families.rooms, core, room, ROWS_MAX);
            let members = members.await?.into_iter().map(|mut row| {
                row["room_id"] = room.as_str().into();
                of_family("rooms", row)
            });
            Ok(members.collect())
        }
        Subject::Agent(user) => of_agent(console, core, user).await,
        Subject::Room(_) | Subject::Session(_) | Subject::Connection(_) => Ok(Vec::new()),
    }
}

async fn of_agent(console: &Console, core: &Core, user: &Id) -> Result<Vec<Value>, Rejection> {
    let found = agents::api::find(&console.families.agents, core, user).await?;
    let found = found.map(|mut row| {
        row["endpoint"] = "agents".into();
        row["since"] = row["connected_at"].take();
        row
    });
    Ok(found.into_iter().collect())
}
