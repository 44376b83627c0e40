//! The numbers of one look at the metrics, for code of the instance itself. Knows no metric.

/// The page of metrics, to be read line by line.
#[derive(Debug)]
pub struct Readings(String);

/// One number of the page.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Reading<'p> {
    /// Name of the series.
    pub name: &'p str,
    labels: &'p str,
    /// The value.
    pub value: f64,
}

impl Readings {
    /// Takes a page in the text format of OpenMetrics.
    #[must_use]
    pub const fn new(page: String) -> Self {
        Self(page)
    }

    /// Returns all numbers.
    pub fn iter(&self) -> impl Iterator<Item = Reading<'_>> {
        self.0.lines().filter_map(Reading::parse)
    }

    /// Returns the sum of a metric's series.
    #[must_use]
    pub fn sum(&self, name: &str) -> f64 {
        self.iter().filter(|one| one.name == name).map(|one| one.value).sum()
    }
}

impl<'p> Reading<'p> {
    fn parse(line: &'p str) -> Option<Self> {
        if line.starts_with('#') {
            return None;
        }
        let (series, value) = line.rsplit_once(' ')?;
        let (name, labels) = series.split_once('{').unwrap_or((series, ""));
        Some(Self { name, labels: labels.trim_end_matches('}'), value: value.parse().ok()? })
    }

    /// Returns the value of a label. The gateway's label values have neither quotes nor commas.
    #[must_use]
    pub fn label(&self, name: &str) -> Option<&'p str> {
        let mut pairs = self.labels.split(',').filter_map(|pair| pair.split_once('='));
        pairs.find(|(label, _)| *label == name).map(|(_, value)| value.trim_matches('"'))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAGE: &str = "# HELP a What.\n# TYPE a counter\na_total{x=\"1\",y=\"z\"} 2\n\
        a_total{x=\"2\",y=\"z\"} 3.5\nb 1\n# EOF\n";

    #[test]
    fn numbers_are_read_with_their_labels() {
        let page = Readings::new(PAGE.to_owned());
        assert_eq!((page.sum("a_total"), page.sum("b"), page.sum("c")), (5.5, 1.0, 0.0));
        let labels: Vec<_> = page.iter().map(|one| (one.label("x"), one.label("w"))).collect();
        assert_eq!(labels, [(Some("1"), None), (Some("2"), None), (None, None)]);
    }
}
