//! Patterns of paths: bounded words for metrics and logs, in which `{}` stands for a segment that varies. Knows no
//! request.

use std::borrow::Cow;

/// A pattern that an operator wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern(Box<str>);

impl Pattern {
    /// Takes a pattern: a path, `{}` for each segment that varies.
    #[must_use]
    pub fn new(text: &str) -> Self {
        Self(text.into())
    }

    /// Returns the text of the pattern.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.0
    }

    /// Returns whether a path fits, without its query and as it came. A segment that varies is never empty.
    #[must_use]
    pub fn fits(&self, path: &str) -> bool {
        let mut segments = path.split('/');
        let fit = |(wanted, segment): (&str, &str)| match wanted {
            "{}" => !segment.is_empty(),
            _ => wanted == segment,
        };
        let mut wanted = self.0.split('/');
        loop {
            match (wanted.next(), segments.next()) {
                (Some(wanted), Some(segment)) if fit((wanted, segment)) => {}
                (None, None) => return true,
                _ => return false,
            }
        }
    }
}

/// Returns the pattern of a path: one of Kubernetes, one of `own`, or `other`. Never a part of the path that a client may
/// choose, so that there are few.
#[must_use]
pub fn of<'p>(path: &str, own: &'p [Pattern]) -> Cow<'p, str> {
    if let Some(of_kubernetes) = of_kubernetes(path) {
        return of_kubernetes.into();
    }
    let own = own.iter().find(|own| own.fits(path));
    own.map_or(Cow::Borrowed(OTHER), |own| Cow::Borrowed(own.text()))
}

/// Returns the pattern of a path of the Kubernetes API.
fn of_kubernetes(path: &str) -> Option<String> {
    let path = path.strip_prefix('/')?;
    if let Some(probe) = PROBES.iter().find(|probe| **probe == path) {
        return Some(format!("/{probe}"));
    }
    let segments: Vec<_> = path.strip_suffix('/').unwrap_or(path).split('/').collect();
    if segments.iter().any(|segment| segment.is_empty()) {
        return None;
    }
    match segments[..] {
        ["livez" | "readyz" | "healthz", _] => Some(format!("/{}/{{}}", segments[0])),
        ["openapi", "v3", ..] => Some("/openapi/v3/{}".into()),
        ["api"] => Some("/api".into()),
        ["api", "v1", ref rest @ ..] => resource("/api/v1", &CORE, rest),
        ["apis"] => Some("/apis".into()),
        ["apis", group] => Some(format!("/apis/{}", group_name(group))),
        ["apis", group, version, ref rest @ ..] => {
            let known = GROUPS.iter().find(|known| known.name == group);
            match known.filter(|_| VERSIONS.contains(&version)) {
                Some(known) => resource(&format!("/apis/{group}/{version}"), known, rest),
                None => resource("/apis/{}/{}", &CUSTOM, rest),
            }
        }
        _ => None,
    }
}

fn group_name(group: &str) -> &str {
    GROUPS.iter().find(|known| known.name == group).map_or("{}", |known| known.name)
}

/// Returns the pattern of the segments behind the version of a group.
fn resource(base: &str, group: &Group, segments: &[&str]) -> Option<String> {
    let (base, segments) = match segments {
        ["watch", rest @ ..] if !rest.is_empty() => (format!("{base}/watch"), rest),
        _ => (base.to_owned(), segments),
    };
    // A namespace's own parts are resources of its own: `namespaces/{}/status`, `namespaces/{}/finalize`.
    let (base, segments) = match segments {
        ["namespaces", _, "status" | "finalize", ..] => (base, segments),
        ["namespaces", _, rest @ ..] if !rest.is_empty() => {
            (format!("{base}/namespaces/{{}}"), rest)
        }
        _ => (base, segments),
    };
    let known = |resource: &str| group.resources.iter().find(|known| **known == resource);
    let part = |part: &str| PARTS.iter().find(|known| **known == part).map_or("{}", |known| *known);
    Some(match *segments {
        [] => base,
        [resource] => format!("{base}/{}", known(resource).unwrap_or(&"{}")),
        [resource, _] => format!("{base}/{}/{{}}", known(resource).unwrap_or(&"{}")),
        [resource, _, sub, ..] => {
            let rest = if segments.len() > 3 { "/{}" } else { "" };
            format!("{base}/{}/{{}}/{}{rest}", known(resource).unwrap_or(&"{}"), part(sub))
        }
    })
}

/// A group of the Kubernetes API with the resources that its server brings.
struct Group {
    name: &'static str,
    resources: &'static [&'static str],
}

/// Pattern of all other paths.
pub const OTHER: &str = "other";

/// Paths without parts that vary.
const PROBES: [&str; 7] =
    ["version", "healthz", "livez", "readyz", "metrics", "openapi/v2", "openapi/v3"];

/// Parts of an object that have a path of their own.
const PARTS: [&str; 14] = [
    "approval",
    "attach",
    "binding",
    "ephemeralcontainers",
    "eviction",
    "exec",
    "finalize",
    "log",
    "portforward",
    "proxy",
    "resize",
    "scale",
    "status",
    "token",
];

/// Versions of the groups below.
const VERSIONS: [&str; 8] =
    ["v1", "v1beta1", "v1beta2", "v1beta3", "v2", "v2beta1", "v2beta2", "v1alpha1"];

const CORE: Group = Group {
    name: "",
    resources: &[
        "bindings",
        "componentstatuses",
        "configmaps",
        "endpoints",
        "events",
        "limitranges",
        "namespaces",
        "nodes",
        "persistentvolumeclaims",
        "persistentvolumes",
        "pods",
        "podtemplates",
        "replicationcontrollers",
        "resourcequotas",
        "secrets",
        "serviceaccounts",
        "services",
    ],
};

/// Groups that an operator has added. Their names are many.
const CUSTOM: Group = Group { name: "{}", resources: &[] };

#[rustfmt::skip]
const GROUPS: [Group; 20] = [
    Group { name: "admissionregistration.k8s.io", resources: &["mutatingwebhookconfigurations", "validatingadmissionpolicies", "validatingadmissionpolicybindings", "validatingwebhookconfigurations"] },
    Group { name: "apiextensions.k8s.io", resources: &["customresourcedefinitions"] },
    Group { name: "apiregistration.k8s.io", resources: &["apiservices"] },
    Group { name: "apps", resources: &["controllerrevisions", "daemonsets", "deployments", "replicasets", "statefulsets"] },
    Group { name: "authentication.k8s.io", resources: &["selfsubjectreviews", "tokenreviews"] },
    Group { name: "authorization.k8s.io", resources: &["localsubjectaccessreviews", "selfsubjectaccessreviews", "selfsubjectrulesreviews", "subjectaccessreviews"] },
    Group { name: "autoscaling", resources: &["horizontalpodautoscalers"] },
    Group { name: "batch", resources: &["cronjobs", "jobs"] },
    Group { name: "certificates.k8s.io", resources: &["certificatesigningrequests"] },
    Group { name: "coordination.k8s.io", resources: &["leases"] },
    Group { name: "discovery.k8s.io", resources: &["endpointslices"] },
    Group { name: "events.k8s.io", resources: &["events"] },
    Group { name: "flowcontrol.apiserver.k8s.io", resources: &["flowschemas", "prioritylevelconfigurations"] },
    Group { name: "metrics.k8s.io", resources: &["nodes", "pods"] },
    Group { name: "networking.k8s.io", resources: &["ingressclasses", "ingresses", "networkpolicies"] },
    Group { name: "node.k8s.io", resources: &["runtimeclasses"] },
    Group { name: "policy", resources: &["poddisruptionbudgets"] },
    Group { name: "rbac.authorization.k8s.io", resources: &["clusterrolebindings", "clusterroles", "rolebindings", "roles"] },
    Group { name: "scheduling.k8s.io", resources: &["priorityclasses"] },
    Group { name: "storage.k8s.io", resources: &["csidrivers", "csinodes", "csistoragecapacities", "storageclasses", "volumeattachments"] },
];

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn paths_of_kubernetes_have_their_pattern() {
        for (path, pattern) in [
            ("/version", "/version"),
            ("/readyz", "/readyz"),
            ("/readyz/etcd", "/readyz/{}"),
            ("/openapi/v2", "/openapi/v2"),
            ("/openapi/v3/apis/apps/v1", "/openapi/v3/{}"),
            ("/api", "/api"),
            ("/api/", "/api"),
            ("/api/v1", "/api/v1"),
            ("/apis", "/apis"),
            ("/apis/apps", "/apis/apps"),
            ("/apis/example.com", "/apis/{}"),
            ("/api/v1/pods", "/api/v1/pods"),
            ("/api/v1/nodes/n1", "/api/v1/nodes/{}"),
            ("/api/v1/nodes/n1/proxy/metrics", "/api/v1/nodes/{}/proxy/{}"),
            ("/api/v1/namespaces", "/api/v1/namespaces"),
            ("/api/v1/namespaces/a", "/api/v1/namespaces/{}"),
            ("/api/v1/namespaces/a/finalize", "/api/v1/namespaces/{}/finalize"),
            ("/api/v1/namespaces/a/status", "/api/v1/namespaces/{}/status"),
            ("/api/v1/namespaces/a/pods", "/api/v1/namespaces/{}/pods"),
            ("/api/v1/namespaces/a/pods/b", "/api/v1/namespaces/{}/pods/{}"),
            ("/api/v1/namespaces/a/pods/b/log", "/api/v1/namespaces/{}/pods/{}/log"),
            ("/api/v1/namespaces/a/pods/b/exec", "/api/v1/namespaces/{}/pods/{}/exec"),
            ("/api/v1/namespaces/a/pods/b/x-y", "/api/v1/namespaces/{}/pods/{}/{}"),
            (
                "/api/v1/namespaces/a/services/b:80/proxy/c/d",
                "/api/v1/namespaces/{}/services/{}/proxy/{}",
            ),
            ("/api/v1/namespaces/a/anything", "/api/v1/namespaces/{}/{}"),
            ("/api/v1/watch/namespaces/a/pods", "/api/v1/watch/namespaces/{}/pods"),
            ("/api/v1/watch", "/api/v1/{}"),
            (
                "/apis/apps/v1/namespaces/a/deployments/b/scale",
                "/apis/apps/v1/namespaces/{}/deployments/{}/scale",
            ),
            ("/apis/apps/v9/namespaces/a/deployments", "/apis/{}/{}/namespaces/{}/{}"),
            ("/apis/apps/v1/pods", "/apis/apps/v1/{}"),
            ("/apis/example.com/v1/things/a/status", "/apis/{}/{}/{}/{}/status"),
        ] {
            assert_eq!(of(path, &[]), pattern, "{path}");
        }
    }

    #[test]
    fn an_operators_patterns_come_behind_those_of_kubernetes() {
        let own = ["/users/{}", "/users/{}/orders/{}", "/api/v1/pods", "/", "/a%2Fb"];
        let own = own.map(Pattern::new);
        for (path, pattern) in [
            ("/users/1", "/users/{}"),
            ("/users/1/orders/2", "/users/{}/orders/{}"),
            ("/users/1/orders", "other"),
            ("/users/", "other"),
            ("/users/1/", "other"),
            ("/users", "other"),
            ("/users//orders/2", "other"),
            ("/api/v1/pods", "/api/v1/pods"),
            ("/", "/"),
            ("//", "other"),
            ("/a%2Fb", "/a%2Fb"),
            ("/a/b", "other"),
            ("/secret-token", "other"),
            ("", "other"),
        ] {
            assert_eq!(of(path, &own), pattern, "{path}");
        }
    }

    proptest! {
        #[test]
        fn no_pattern_shows_a_segment_that_a_client_chose(
            start in "(/api/v1|/apis/(apps|XX)/(v1|XX)|/openapi/v3|/healthz)?",
            rest in "(/(XX|namespaces|pods|watch|log|deployments|)){0,6}",
        ) {
            let own = [Pattern::new("/{}/{}/pods")];
            let pattern = of(&format!("{start}{rest}"), &own);
            prop_assert!(!pattern.contains("XX"), "{}", pattern);
            prop_assert!(pattern == OTHER || pattern.starts_with('/'));
            prop_assert!(pattern.len() < 120);
        }
    }
}
