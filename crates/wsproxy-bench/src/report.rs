//! The results of a scenario, as a table for people and as JSON for scripts.

use std::fmt::Write as _;

use hdrhistogram::Histogram;
use serde::Serialize;
use serde_json::{Map, Value, json};

/// The results of a scenario.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Name of the scenario.
    pub scenario: String,
    /// Kind of server.
    pub target: String,
    /// Settings, by name.
    pub settings: Map<String, Value>,
    /// Figures, by name; the unit is the last part of the name.
    pub figures: Map<String, Value>,
    /// Reasons why the run is not good; empty for a good run.
    pub problems: Vec<String>,
}

impl Report {
    /// Creates an empty report.
    #[must_use]
    pub fn new(scenario: &str, target: &str) -> Self {
        Self {
            scenario: scenario.to_owned(),
            target: target.to_owned(),
            settings: Map::new(),
            figures: Map::new(),
            problems: Vec::new(),
        }
    }

    /// Notes a setting.
    pub fn set(&mut self, name: &str, value: impl Into<Value>) {
        self.settings.insert(name.to_owned(), value.into());
    }

    /// Notes a figure.
    pub fn figure(&mut self, name: &str, value: impl Into<Value>) {
        self.figures.insert(name.to_owned(), value.into());
    }

    /// Notes a quotient with three decimals; does nothing where the divisor is 0.
    pub fn ratio(&mut self, name: &str, amount: f64, per: f64) {
        if let Some(value) = ratio(amount, per) {
            self.figures.insert(name.to_owned(), json!((value * 1e3).round() / 1e3));
        }
    }

    /// Notes the quantiles of a histogram of nanoseconds, in milliseconds.
    pub fn quantiles(&mut self, name: &str, histogram: &Histogram<u64>) {
        for (label, quantile) in [("p50", 0.5), ("p99", 0.99), ("p999", 0.999), ("max", 1.0)] {
            if !histogram.is_empty() {
                let value = histogram.value_at_quantile(quantile) as f64;
                self.ratio(&format!("{name}_{label}_ms"), value, 1e6);
            }
        }
    }

    /// Returns a figure that was noted before; 0 where there is none.
    #[must_use]
    pub fn seconds(&self, name: &str) -> f64 {
        self.figures.get(name).and_then(Value::as_f64).unwrap_or(0.0)
    }

    /// Notes a reason why the run is not good, if the condition holds.
    pub fn problem_if(&mut self, wrong: bool, text: impl FnOnce() -> String) {
        if wrong {
            self.problems.push(text());
        }
    }

    /// Returns whether the run is good: no reason against it was noted.
    #[must_use]
    pub fn is_good(&self) -> bool {
        self.problems.is_empty()
    }

    /// Returns the table for people.
    #[must_use]
    pub fn table(&self) -> String {
        let mut table = format!("{} against {}\n", self.scenario, self.target);
        let width = self.figures.keys().chain(self.settings.keys()).map(String::len).max();
        let width = width.unwrap_or(0);
        for (name, value) in self.settings.iter().chain(&self.figures) {
            let _ = writeln!(table, "  {name:<width$}  {}", shown(value));
        }
        for problem in &self.problems {
            let _ = writeln!(table, "  PROBLEM: {problem}");
        }
        table
    }
}

/// Returns a quotient; `None` where the divisor is 0.
#[must_use]
pub fn ratio(amount: f64, per: f64) -> Option<f64> {
    (per > 0.0 && amount.is_finite()).then(|| amount / per)
}

fn shown(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ratios_need_something_to_divide_by() {
        assert_eq!(ratio(6.0, 3.0), Some(2.0));
        assert_eq!(ratio(6.0, 0.0), None);
        assert_eq!(ratio(f64::NAN, 1.0), None);
        let mut report = Report::new("x", "y");
        report.ratio("cpu_us", 10_000.0, 3.0);
        report.ratio("nothing", 1.0, 0.0);
        assert_eq!(report.figures["cpu_us"], json!(3_333.333));
        assert!(!report.figures.contains_key("nothing"));
    }

    #[test]
    fn table_shows_settings_figures_and_problems() {
        let mut report = Report::new("fanout", "raw");
        report.set("connections", 50);
        report.figure("delivered", 100);
        report.problem_if(false, || "not this".to_owned());
        assert!(report.is_good());
        report.problem_if(true, || "2 messages lost".to_owned());
        let table = report.table();
        assert!(table.contains("connections  50") && table.contains("PROBLEM: 2 messages lost"));
        assert!(!report.is_good());
    }
}
