//! The audit log: the rows that calls leave in a database.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use wsproxy::{
    audit::{Audit, row::AuditRow},
    config::database::AuditForm,
    server::Instance,
};
use wsproxy_proto::agents::outcome::Outcome;

use super::audit_log::{FOREIGN_LOG, Log, TestDatabase, id, row};
use crate::support::{eventually_yes, gateway, postgres::PostgresServer};

#[tokio::test(flavor = "multi_thread")]
async fn a_call_leaves_one_row_with_all_columns() {
    for database in TestDatabase::both().await {
        let log = Log::start(&database.config()).await;
        let (user, request, other) = (id("user_1"), id("q-1"), id("q-2"));
        let begun = UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        log.audit.record(AuditRow {
            result: Some(br#"{"content":"x","token":"S3CRET"}"#),
            error: Some(br#""it \"broke\"""#),
            success: Some(false),
            begun,
            caller: Some("backend"),
            traceparent: Some("00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"),
            ..row(&user, &request, log.audit.params(br#"{"path":"/x","password":"S3CRET"}"#))
        });
        let third = id("q-3");
        log.audit.record(AuditRow {
            result: Some(b"null"),
            error: Some(b"null"),
            ..row(&user, &third, log.audit.params(b"{}"))
        });
        log.audit.record(AuditRow {
            success: None,
            outcome: Outcome::Timeout,
            execution_time: None,
            ..row(&user, &other, log.audit.params(b"[1]"))
        });
        log.written().await;
        let columns = "user_id, request_id, tool_name, params, result, success, error, execution_time_ms, created_at, outcome, details";
        let rows = database
            .query(&format!("SELECT {columns} FROM tool_execution_logs ORDER BY request_id"))
            .await;
        let text = |row: usize, column: usize| rows[row][column].clone().unwrap_or_default();
        let value = |row, column| serde_json::from_str::<Value>(&text(row, column)).unwrap();
        assert_eq!(rows.len(), 3);
        assert_eq!([text(0, 0), text(0, 1), text(0, 2)], ["user_1", "q-1", "read_file"]);
        assert_eq!(value(0, 3), json!({"path": "/x", "password": "[redacted]"}));
        assert_eq!(value(0, 4), json!({"content": "x", "token": "[redacted]"}));
        assert!(["f", "0"].contains(&&*text(0, 5)));
        assert_eq!([text(0, 6), text(0, 7)], ["it \"broke\"", "12"]);
        assert!(text(0, 8).starts_with("2023-11-14 22:13:20.123"), "UTC: {}", text(0, 8));
        assert_eq!(text(0, 9), "response");
        let details = json!({
            "server": "s-1", "caller": "backend", "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
            "took_ms": 15, "params_bytes": 33, "result_bytes": 32,
        });
        assert_eq!(value(0, 10), details);
        assert_eq!([&rows[2][4], &rows[2][6]], [&None, &None], "a null is no value");
        assert_eq!((rows[1][4].as_ref(), &*text(1, 9)), (None, "timeout"));
        assert_eq!([text(1, 6), text(1, 7)], ["The agent of user_1 did not answer in time.", "15"]);
        assert_eq!(value(1, 10)["caller"], "redis");
        log.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn parameters_and_results_are_stored_as_configured() {
    let database = TestDatabase::sqlite();
    let mut config = database.config();
    config.audit.params = AuditForm::Nothing;
    config.audit.results = AuditForm::Full;
    let log = Log::start(&config).await;
    log.record_call("q-1", log.audit.params(br#"{"a":1}"#), br#"{"token":"x"}"#);
    log.close().await;
    let rows = database.query("SELECT params, result FROM tool_execution_logs").await;
    assert_eq!(rows, [[None, Some(r#"{"token":"x"}"#.to_owned())]]);
}

/// Values that a database, or a column of it, would refuse.
fn poison() -> Vec<(&'static str, Vec<u8>)> {
    let nested = format!("{}{}", "[".repeat(20_000), "]".repeat(20_000));
    vec![
        ("nul", br#"{"a":"\u0000","\u0000":1}"#.to_vec()),
        ("lone", br#"["\ud800","\udfff\ud800"]"#.to_vec()),
        ("bytes", b"[\"\xff\xfe\"]".to_vec()),
        ("raw-nul", b"[\"\0\"]".to_vec()),
        ("number", b"[1e999999999,-1e-99999,1E+131072]".to_vec()),
        ("digits", format!("[0.{}]", "1".repeat(20_000)).into_bytes()),
        ("deep", nested.into_bytes()),
        ("broken", b"{\"a\":".to_vec()),
        ("empty", Vec::new()),
        ("long", format!("[\"{}\"]", "\\u0000é".repeat(100_000)).into_bytes()),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn values_that_a_database_refuses_are_stored_beside_the_others() {
    for database in TestDatabase::both().await {
        let log = Log::start(&database.config()).await;
        for (name, value) in poison() {
            log.record(&format!("before-{name}"), "1");
            log.record_call(name, log.audit.params(&value), &value);
        }
        let (user, request) = (id("u-1"), id("columns"));
        log.audit.record(AuditRow {
            tool: "a\0b",
            error: Some(br#""a\u0000b""#),
            execution_time: Some(b"1e300"),
            caller: Some("a\0b"),
            begun: UNIX_EPOCH + Duration::from_secs(1 << 37),
            ..row(&user, &request, log.audit.params(b"{}"))
        });
        log.written().await;
        let written = poison().len() as u64 * 2 + 1;
        assert_eq!(
            [log.rows("written"), log.rows("encoded"), log.rows("refused")],
            [written, 0, 0]
        );
        let sql = "SELECT tool_name, error, execution_time_ms FROM tool_execution_logs WHERE request_id = 'columns'";
        let row = database.query(sql).await.remove(0);
        let clean = || Some("a\u{fffd}b".to_owned());
        assert_eq!(row, [clean(), clean(), Some("2147483647".into())]);
        for request in ["long", "deep"] {
            let sql =
                format!("SELECT result FROM tool_execution_logs WHERE request_id = '{request}'");
            let result = database.column(&sql).await.remove(0).unwrap();
            assert!(result.len() <= 70_000, "{request}: {}", result.len());
        }
        log.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_a_database_refuses_is_stored_as_base64() {
    let server = PostgresServer::shared().await;
    server.query("CREATE DATABASE latin ENCODING 'LATIN1' TEMPLATE template0").await;
    let mut config = TestDatabase::sqlite().config();
    config.database.url = Some(server.url_of("latin").into());
    let log = Log::start(&config).await;
    for n in 0..700 {
        let result = if n % 300 == 7 { r#"{"text":"漢字"}"# } else { r#"{"text":"é"}"# };
        log.record(&format!("q-{n}"), result);
    }
    log.written().await;
    assert_eq!([log.rows("written"), log.rows("encoded"), log.rows("refused")], [697, 3, 0]);
    let sql = "SELECT request_id, encode(decode(result->>'base64', 'base64'), 'hex'), result->>'note' \
               FROM tool_execution_logs WHERE result ? 'base64' ORDER BY id";
    let rows = server.query_in("latin", sql).await;
    let hex: String = r#"{"text":"漢字"}"#.bytes().map(|byte| format!("{byte:02x}")).collect();
    let requests: Vec<_> = rows.iter().map(|row| row[0].as_deref().unwrap()).collect();
    assert_eq!(requests, ["q-7", "q-307", "q-607"]);
    for row in &rows {
        assert_eq!(row[1].as_deref(), Some(&*hex));
        assert_eq!(row[2].as_deref(), Some("The database refused this value (22P05)"));
    }
    assert_eq!(
        server.query_in("latin", "SELECT count(*) FROM tool_execution_logs").await,
        [[Some("700".to_owned())]]
    );
    log.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_is_refused_in_any_form_stops_no_other() {
    for database in TestDatabase::both().await {
        let log = Log::start(&database.config()).await;
        let refuse = match database {
            TestDatabase::Postgres(..) => {
                "ALTER TABLE tool_execution_logs ADD CHECK (request_id <> 'q-3'), ADD CHECK (params::text NOT LIKE '%bad%')"
            }
            TestDatabase::Sqlite(_) => {
                "CREATE TRIGGER strict BEFORE INSERT ON tool_execution_logs \
                 WHEN NEW.request_id = 'q-3' OR NEW.params LIKE '%bad%' BEGIN SELECT RAISE(ABORT, 'no'); END"
            }
        };
        database.query(refuse).await;
        for n in 0..20 {
            let params = if n == 5 { r#""bad""# } else { "{}" };
            log.record_call(&format!("q-{n}"), log.audit.params(params.as_bytes()), b"1");
        }
        log.written().await;
        assert_eq!([log.rows("written"), log.rows("encoded"), log.rows("refused")], [18, 1, 1]);
        assert_eq!(database.number("SELECT count(*) FROM tool_execution_logs").await, 19);
        let sql = "SELECT params FROM tool_execution_logs WHERE request_id = 'q-5'";
        assert!(database.column(sql).await[0].as_deref().unwrap().contains("ImJhZCI="));
        log.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_of_an_application_get_the_columns_they_have() {
    let database = TestDatabase::postgres().await;
    database.query(FOREIGN_LOG).await;
    let columns = "SELECT string_agg(column_name || data_type, ',' ORDER BY ordinal_position) \
                   FROM information_schema.columns WHERE table_name = 'tool_execution_logs'";
    let old = "SELECT count(*), md5(string_agg(t::text, '|' ORDER BY id)) FROM tool_execution_logs AS t WHERE id <= 1000";
    let before = (database.query(columns).await, database.query(old).await);
    let log = Log::start(&database.config()).await;
    log.record("q-1", r#"{"a":1}"#);
    log.close().await;
    assert_eq!((database.query(columns).await, database.query(old).await), before);
    let sql = "SELECT request_id, result, success, created_at > now() AT TIME ZONE 'UTC' - interval '1 minute' \
               FROM tool_execution_logs WHERE id > 1000";
    let rows = database.query(sql).await;
    assert_eq!(rows, [["q-1", r#"{"a": 1}"#, "t", "t"].map(|text| Some(text.to_owned()))]);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_rows_are_written_in_their_order() {
    for database in TestDatabase::both().await {
        let log = Log::start(&database.config()).await;
        for n in 0..20_000 {
            while log.audit.status().queued > 9_000 {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            log.record(&format!("q-{n}"), r#"{"content":"text","size":4}"#);
        }
        // An end waits five seconds at most, and a busy machine may need more for all that is queued.
        log.written().await;
        log.close().await;
        let requests =
            database.column("SELECT request_id FROM tool_execution_logs ORDER BY id").await;
        assert_eq!(requests.len(), 20_000);
        assert!(
            requests.iter().enumerate().all(|(n, id)| id.as_deref() == Some(&*format!("q-{n}")))
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn old_rows_are_deleted_where_so_configured() {
    for database in TestDatabase::both().await {
        let first = Log::start(&database.config()).await;
        let (user, request) = (id("u-1"), id("q-1"));
        let now = SystemTime::now();
        for n in 0..7_000 {
            // The younger ones are a minute too young.
            let age = if n < 6_500 { 3_601 } else { 3_540 };
            let begun = now - Duration::from_secs(age);
            first
                .audit
                .record(AuditRow { begun, ..row(&user, &request, first.audit.params(b"{}")) });
        }
        first.written().await;
        let mut config = database.config();
        config.audit.keep = Duration::from_secs(3600);
        Audit::check(&config, &first.database).await.unwrap();
        let second = Log::start(&config).await;
        eventually_yes("old rows are deleted", async || {
            database.number("SELECT count(*) FROM tool_execution_logs").await == 500
        })
        .await;
        first.close().await;
        second.close().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn deletion_is_refused_without_an_index() {
    let database = TestDatabase::postgres().await;
    database.query(FOREIGN_LOG).await;
    let mut config = database.config();
    config.audit.keep = Duration::from_secs(3600);
    let log = Log::start(&config).await;
    let refusal = Audit::check(&config, &log.database).await.unwrap_err();
    let mut served = gateway::config(None);
    served.endpoints.agents = true;
    (served.database, served.audit) = (config.database.clone(), config.audit.clone());
    let error = Instance::start(served, |_, _| axum::Router::new()).await.err().unwrap();
    assert_eq!(error.root_cause().to_string(), refusal);
    let sql = refusal.lines().last().unwrap();
    assert!(sql.starts_with("CREATE INDEX CONCURRENTLY"), "{refusal}");
    log.record("q-1", "1");
    log.close().await;
    assert_eq!(database.number("SELECT count(*) FROM tool_execution_logs").await, 1001);
    database.query(sql).await;
    let log = Log::start(&config).await;
    Audit::check(&config, &log.database).await.unwrap();
    eventually_yes("rows of 2020 are deleted", async || {
        database.number("SELECT count(*) FROM tool_execution_logs").await == 1
    })
    .await;
    log.close().await;
}
