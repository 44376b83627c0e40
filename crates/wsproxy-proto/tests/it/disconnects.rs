//! The table of endings against the table that clients are tested against, `spec/finality.json`.

use std::collections::BTreeMap;

use serde_json::Value;
use wsproxy_proto::disconnect::Disconnect;

fn rule() -> Value {
    serde_json::from_str(include_str!("../../../../spec/finality.json")).unwrap()
}

/// Codes and reasons of the rows that the gateway sends, by label.
fn sent_by_gateway(rule: &Value) -> BTreeMap<&str, (u64, &str)> {
    let rows = rule["closes"].as_array().unwrap().iter().filter(|row| row["by"] == "gateway");
    let row = |row| {
        let row: &Value = row;
        let code = row["code"].as_u64().unwrap();
        (row["name"].as_str().unwrap(), (code, row["reason"].as_str().unwrap()))
    };
    rows.map(row).collect()
}

#[test]
fn table_of_clients_has_every_code_and_reason() {
    let rule = rule();
    let ours = Disconnect::ALL.iter().map(|end| (end.label, (u64::from(end.code), end.reason)));
    assert_eq!(ours.collect::<BTreeMap<_, _>>(), sent_by_gateway(&rule));
}

#[test]
fn clients_can_tell_every_advice_by_code_and_reason() {
    let rule = rule();
    let mut advice = BTreeMap::new();
    for row in rule["closes"].as_array().unwrap() {
        let told = (row["code"].as_u64(), row["reason"].as_str());
        let before = advice.insert(told, &row["advice"]);
        assert!(before.is_none_or(|before| *before == row["advice"]), "{told:?} has two advices");
        assert!(rule["advice"][row["advice"].as_str().unwrap()].is_string());
        assert!(
            row["meaning"].is_string()
                && rule["close_senders"][row["by"].as_str().unwrap()].is_string()
        );
    }
}
