//! The database of agents over PostgreSQL and SQLite: secrets, clear values of an application, status.

use std::{
    sync::Arc,
    time::{Duration, SystemTime},
};

use secrecy::ExposeSecret;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use wsproxy::{
    config::{Config, agents::LegacySecrets},
    database::{
        Database,
        agents::{NewSecret, Others, Platform, UserRule},
        error::SecretsError,
        secrets::{BadSecret, Credential, SECRETS_MAX, SecretId},
    },
};
use wsproxy_proto::names::Id;

use super::audit_log::TestDatabase;
use crate::support::eventually_yes;

/// A running database of an instance.
pub(super) struct Running {
    pub(super) database: Arc<Database>,
    background: TaskTracker,
    end: CancellationToken,
}

impl Running {
    /// Starts it, and waits until its tables are ready.
    pub(super) async fn start(config: &Config) -> Self {
        let running = Self::start_away(config);
        running.database.ready().await;
        running
    }

    /// Starts it; the database may be away.
    pub(super) fn start_away(config: &Config) -> Self {
        let (background, end) = (TaskTracker::new(), CancellationToken::new());
        let database = Database::start(config, &background, &end).unwrap();
        Self { database, background, end }
    }

    /// Presents a secret, now.
    pub(super) async fn open(&self, user: &str, secret: &str) -> Result<SecretId, BadSecret> {
        self.open_at(user, secret, SystemTime::now()).await
    }

    async fn open_at(
        &self,
        user: &str,
        secret: &str,
        now: SystemTime,
    ) -> Result<SecretId, BadSecret> {
        let credential = self.database.credential(&id(user)).await.unwrap();
        Credential::check(credential.as_ref(), secret.as_bytes(), now, LegacySecrets::Accept)
    }

    /// Ends it as an instance does.
    pub(super) async fn close(self) {
        self.end.cancel();
        self.background.close();
        self.background.wait().await;
        self.database.close().await;
    }
}

pub(super) fn id(text: &str) -> Id {
    Id::parse(text).unwrap()
}

pub(super) fn wish(user: UserRule, others: Others) -> NewSecret {
    NewSecret { platform: None, expires_in: None, secret: None, user, others }
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_open_until_they_are_revoked_or_expire() {
    for place in TestDatabase::both().await {
        let running = Running::start(&place.config()).await;
        let database = &running.database;
        let first = database.issue(&id("u1"), NEW).await.unwrap();
        let [one, other] = [first.secret.expose_secret(), "wsa_of_nobody_at_all"];
        assert_eq!(running.open("u1", one).await, Ok(SecretId::Stored(first.id)));
        assert_eq!(running.open("u1", other).await, Err(BadSecret));
        assert_eq!(running.open("u2", one).await, Err(BadSecret));
        assert!((first.created, first.revoked) == (true, false));
        let again = database.issue(&id("u1"), NEW).await.unwrap_err();
        assert_eq!(again, SecretsError::Exists);

        // A rotation: both open for the overlap, then the new one alone.
        let overlap = Others::Expire(Duration::from_secs(3600));
        let second = database.issue(&id("u1"), wish(UserRule::Known, overlap)).await.unwrap();
        let two = second.secret.expose_secret();
        assert!(running.open("u1", one).await.is_ok() && running.open("u1", two).await.is_ok());
        let later = SystemTime::now() + Duration::from_secs(3601);
        assert_eq!(running.open_at("u1", one, later).await, Err(BadSecret));
        assert!(running.open_at("u1", two, later).await.is_ok());

        // One is revoked, then all.
        assert_eq!(database.revoke(&id("u1"), Some(first.id)).await.unwrap().secrets, 1);
        assert_eq!(running.open("u1", one).await, Err(BadSecret));
        assert!(running.open("u1", two).await.is_ok());
        // Its connections may be open still, so that they are told again.
        assert_eq!(database.revoke(&id("u1"), Some(first.id)).await.unwrap().secrets, 0);
        let unknown = database.revoke(&id("u1"), Some(uuid::Uuid::nil())).await.unwrap_err();
        assert_eq!(unknown, SecretsError::UnknownSecret);
        assert_eq!(database.revoke(&id("u1"), None).await.unwrap().secrets, 1);
        assert_eq!(running.open("u1", two).await, Err(BadSecret));

        let third = database.issue(&id("u1"), wish(UserRule::Any, Others::Keep)).await.unwrap();
        database.remove(&id("u1")).await.unwrap();
        assert_eq!(running.open("u1", third.secret.expose_secret()).await, Err(BadSecret));
        assert_eq!(place.number("SELECT count(*) FROM agent_secrets").await, 0);
        assert_eq!(database.remove(&id("u1")).await.unwrap_err(), SecretsError::UnknownUser);
        let unknown = database.issue(&id("u1"), wish(UserRule::Known, Others::Keep)).await;
        assert_eq!(unknown.unwrap_err(), SecretsError::UnknownUser);
        running.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn revoked_secrets_of_open_connections_are_found() {
    for place in TestDatabase::both().await {
        let running = Running::start(&place.config()).await;
        let database = &running.database;
        let more = async |user: &str, others| {
            let issued = database.issue(&id(user), wish(UserRule::Any, others)).await.unwrap();
            SecretId::Stored(issued.id)
        };
        let (kept, revoked) = (more("u1", Others::Keep).await, more("u1", Others::Keep).await);
        let expired = more("u2", Others::Keep).await;
        more("u2", Others::Expire(Duration::ZERO)).await;
        let SecretId::Stored(secret) = revoked else { panic!("{revoked:?}") };
        database.revoke(&id("u1"), Some(secret)).await.unwrap();
        let opened = [
            (id("u1"), kept),
            (id("u1"), revoked),
            (id("u2"), expired),
            (id("u2"), SecretId::Clear),
            (id("absent"), SecretId::Clear),
        ];
        let found = database.revoked_since(&opened).await.unwrap();
        assert_eq!(found, [(id("u1"), revoked), (id("absent"), SecretId::Clear)]);
        database.revoke(&id("u1"), None).await.unwrap();
        let opened = [(id("u1"), kept), (id("u1"), SecretId::Clear)];
        assert_eq!(database.revoked_since(&opened).await.unwrap(), opened);
        running.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn silent_rows_are_found_and_ended() {
    for place in TestDatabase::both().await {
        let running = Running::start(&place.config()).await;
        let database = &running.database;
        for user in ["u1", "u2", "u3", "u4"] {
            database.issue(&id(user), NEW).await.unwrap();
        }
        place.query("UPDATE agent_credentials SET status = 'connected', last_seen = '2020-01-01 00:00:00'").await;
        place.query("UPDATE agent_credentials SET last_seen = NULL WHERE user_id = 'u2'").await;
        place.query("UPDATE agent_credentials SET last_seen = '2999-01-01 00:00:00' WHERE user_id = 'u3'").await;
        let before = SystemTime::now() - Duration::from_secs(180);
        assert_eq!(database.stale("", before, 1).await.unwrap(), [id("u1")]);
        assert_eq!(database.stale("u1", before, 9).await.unwrap(), [id("u2"), id("u4")]);
        let gone = [id("u1"), id("u2"), id("u3")];
        assert_eq!(database.end_stale(&gone, before).await.unwrap(), 2);
        assert_eq!(database.end_stale(&gone, before).await.unwrap(), 0);
        let connected =
            "SELECT user_id FROM agent_credentials WHERE status = 'connected' ORDER BY user_id";
        let connected = place.column(connected).await;
        assert_eq!(connected, [Some("u3".into()), Some("u4".into())]);
        running.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_has_at_most_eight_valid_secrets() {
    for place in TestDatabase::both().await {
        let running = Running::start(&place.config()).await;
        let more = || wish(UserRule::Any, Others::Keep);
        let (database, user) = (&running.database, id("u1"));
        let mut issued = Vec::new();
        for _ in 0..SECRETS_MAX {
            issued.push(database.issue(&user, more()).await.unwrap());
        }
        assert_eq!(database.issue(&user, more()).await.unwrap_err(), SecretsError::TooMany);
        for one in &issued {
            let opened = running.open("u1", one.secret.expose_secret()).await;
            assert_eq!(opened, Ok(SecretId::Stored(one.id)));
        }
        // A refused wish has changed nothing, though it was one to let the others expire.
        let overlap = Others::Expire(Duration::from_secs(60));
        let refused = database.issue(&user, wish(UserRule::Known, overlap)).await.unwrap_err();
        assert_eq!(refused, SecretsError::TooMany);
        let ending = "SELECT count(*) FROM agent_secrets WHERE expires_at IS NOT NULL";
        assert_eq!(place.number(ending).await, 0);
        let fresh = database.issue(&user, wish(UserRule::Any, Others::Revoke)).await.unwrap();
        assert!(fresh.revoked && !fresh.created);
        assert_eq!(running.open("u1", issued[0].secret.expose_secret()).await, Err(BadSecret));
        assert!(running.open("u1", fresh.secret.expose_secret()).await.is_ok());
        running.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn two_commands_that_add_one_user_make_one_user() {
    for place in TestDatabase::both().await {
        let running = Running::start(&place.config()).await;
        let (database, user) = (&running.database, id("u1"));
        let any = || database.issue(&user, wish(UserRule::Any, Others::Keep));
        let (a, b, c) = tokio::join!(any(), any(), any());
        let created = [a, b, c].map(|issued| issued.unwrap().created);
        assert_eq!(created.iter().filter(|created| **created).count(), 1, "{created:?}");
        assert_eq!(place.number("SELECT count(*) FROM agent_secrets").await, 3);
        running.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clear_value_of_an_application_alone_counts() {
    for place in TestDatabase::both().await {
        let running = Running::start(&place.config()).await;
        let database = &running.database;
        let ours = database.issue(&id("u1"), NEW).await.unwrap();
        let clear = "0f".repeat(32);
        let write = |value: &str| {
            format!("UPDATE agent_credentials SET shared_secret = '{value}' WHERE user_id = 'u1'")
        };
        place.query(&write(&clear)).await;
        assert_eq!(running.open("u1", &clear).await, Ok(SecretId::Clear));
        assert_eq!(running.open("u1", ours.secret.expose_secret()).await, Err(BadSecret));
        assert!(database.show(&id("u1")).await.unwrap().is_clear);
        let rotated = database.issue(&id("u1"), wish(UserRule::Known, Others::Keep)).await;
        assert_eq!(rotated.unwrap_err(), SecretsError::Clear);

        // The application rewrites it: the old value is refused at once.
        place.query(&write("another value of 32 characters and more")).await;
        assert_eq!(running.open("u1", &clear).await, Err(BadSecret));

        // Secrets of the time before stay dead when the value is adopted.
        place.query(&write(&clear)).await;
        let adopted = database.adopt(true).await.unwrap();
        assert_eq!((adopted.adopted, adopted.too_short), (vec!["u1".into()], vec![]));
        assert_eq!(running.open("u1", &clear).await, Ok(SecretId::Clear));
        assert_eq!(database.adopt(false).await.unwrap().adopted, ["u1"]);
        assert!(matches!(running.open("u1", &clear).await, Ok(SecretId::Stored(_))));
        assert_eq!(running.open("u1", ours.secret.expose_secret()).await, Err(BadSecret));
        let stored = "SELECT shared_secret FROM agent_credentials";
        assert!(place.column(stored).await[0].as_deref().unwrap().starts_with("sha256$"));
        assert!(database.adopt(false).await.unwrap().adopted.is_empty());
        running.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn adopting_leaves_short_values_and_lists_them() {
    for place in TestDatabase::both().await {
        let running = Running::start(&place.config()).await;
        for (user, secret) in [("long", "x".repeat(32)), ("short", "x".repeat(31))] {
            let sql = format!(
                "INSERT INTO agent_credentials (user_id, shared_secret, platform, status) \
                 VALUES ('{user}', '{secret}', 'linux', 'pending')"
            );
            place.query(&sql).await;
        }
        let adopted = running.database.adopt(false).await.unwrap();
        assert_eq!(
            (adopted.adopted, adopted.too_short),
            (vec!["long".into()], vec!["short".into()])
        );
        assert!(running.open("long", &"x".repeat(32)).await.is_ok());
        assert_eq!(running.open("short", &"x".repeat(31)).await, Ok(SecretId::Clear));
        running.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn revoking_replaces_a_clear_value_by_one_that_opens_nothing() {
    for place in TestDatabase::both().await {
        let running = Running::start(&place.config()).await;
        let clear = "ab".repeat(32);
        let sql = format!(
            "INSERT INTO agent_credentials (user_id, shared_secret, platform, status) \
             VALUES ('u1', '{clear}', 'linux', 'pending')"
        );
        place.query(&sql).await;
        let revoked = running.database.revoke(&id("u1"), None).await.unwrap();
        assert_eq!((revoked.secrets, revoked.clear), (0, true));
        assert_eq!(running.open("u1", &clear).await, Err(BadSecret));
        let value = place.column("SELECT shared_secret FROM agent_credentials").await.remove(0);
        assert_eq!(running.open("u1", &value.unwrap()).await, Err(BadSecret));
        running.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn users_are_listed_page_by_page() {
    for place in TestDatabase::both().await {
        let running = Running::start(&place.config()).await;
        let database = &running.database;
        for n in 0..5 {
            let platform = Some(Platform::Darwin);
            let wish = NewSecret { platform, expires_in: Some(Duration::from_secs(60)), ..NEW };
            database.issue(&id(&format!("u{n}")), wish).await.unwrap();
        }
        let users = async |after: &str, connected| {
            let page = database.list(after, 3, connected).await.unwrap();
            page.into_iter().map(|agent| agent.user_id).collect::<Vec<_>>()
        };
        assert_eq!(users("", false).await, ["u0", "u1", "u2"]);
        assert_eq!(users("u2", false).await, ["u3", "u4"]);
        assert!(users("", true).await.is_empty());
        let agent = database.show(&id("u3")).await.unwrap();
        assert_eq!((agent.platform.as_str(), agent.status.as_str()), ("darwin", "pending"));
        let secrets = agent.secrets.unwrap();
        let lives = secrets[0].expires_at.unwrap().duration_since(secrets[0].created_at.unwrap());
        assert!(
            lives.as_ref().is_ok_and(|time| time.as_millis().abs_diff(60_000) < 5),
            "{lives:?}"
        );
        running.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn status_is_written_behind_in_utc() {
    for place in TestDatabase::both().await {
        let running = Running::start(&place.config()).await;
        let database = &running.database;
        for user in ["u1", "u2"] {
            database.issue(&id(user), NEW).await.unwrap();
        }
        let status = async |user: &str| {
            let agent = database.show(&id(user)).await.unwrap();
            (agent.status, agent.last_seen)
        };
        database.connected(&id("u1"));
        database.connected(&id("nobody"));
        eventually_yes("u1 is connected", async || status("u1").await.0 == "connected").await;
        let (_, seen) = status("u1").await;
        let age = SystemTime::now().duration_since(seen.unwrap()).unwrap();
        assert!(age < Duration::from_secs(60), "{age:?}");
        database.disconnected(&id("u1"));
        eventually_yes("u1 is gone", async || status("u1").await.0 == "disconnected").await;

        // A sign of life waits for its minute, or for the end.
        database.seen(&id("u2"));
        assert_eq!(status("u2").await, ("pending".into(), None));
        running.close().await;
        let statuses = "SELECT status FROM agent_credentials ORDER BY user_id";
        let statuses: Vec<_> = place.column(statuses).await.into_iter().flatten().collect();
        assert_eq!(statuses, ["disconnected", "connected"]);

        // Without a Redis no agent is connected when an instance starts.
        let running = Running::start(&place.config()).await;
        eventually_yes("nobody is connected", async || {
            place.number("SELECT count(*) FROM agent_credentials WHERE status = 'connected'").await
                == 0
        })
        .await;
        running.close().await;
    }
}

pub(super) const NEW: NewSecret = NewSecret {
    platform: None,
    expires_in: None,
    secret: None,
    user: UserRule::New,
    others: Others::Keep,
};
