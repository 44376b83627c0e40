//! The files of the console's page. They hold no data: the page asks the worker API with the operator's key.

use axum::{Router, response::Redirect, response::Response, routing::get};
use http::{HeaderName, HeaderValue, header};

use crate::http::api;

/// Returns the routes `/console…`, for the admin port.
pub fn router<S: Clone + Send + Sync + 'static>() -> Router<S> {
    let file = |kind: &'static str, text: &'static str| get(async move || file(kind, text));
    Router::new()
        .route("/console", file("text/html", include_str!("page.html")))
        .route("/console/", get(async || Redirect::permanent("../console")))
        .route("/console/page.js", file("text/javascript", include_str!("page.js")))
        .route("/console/chart.js", file("text/javascript", include_str!("chart.js")))
        .route("/console/found.js", file("text/javascript", include_str!("found.js")))
        .route("/console/page.css", file("text/css", include_str!("page.css")))
        .method_not_allowed_fallback(api::method_not_allowed)
}

fn file(kind: &str, text: &'static str) -> Response {
    let mut response = Response::new(text.into());
    let headers = response.headers_mut();
    if let Ok(kind) = HeaderValue::try_from(format!("{kind}; charset=utf-8")) {
        headers.insert(header::CONTENT_TYPE, kind);
    }
    for (name, value) in [
        (header::CONTENT_SECURITY_POLICY, POLICY),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-store"),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::X_FRAME_OPTIONS, "DENY"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
        (HeaderName::from_static("cross-origin-opener-policy"), "same-origin"),
    ] {
        headers.insert(name, HeaderValue::from_static(value));
    }
    response
}

/// Nothing is loaded from elsewhere, nothing inline runs, and texts never become markup.
const POLICY: &str = "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; \
                      img-src 'none'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; \
                      require-trusted-types-for 'script'; trusted-types 'none'";
