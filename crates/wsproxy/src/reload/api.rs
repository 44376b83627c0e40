//! `POST /api/v1/reload`: the reload as a route of the worker API.

use std::sync::Arc;

use axum::{Json, Router, extract::State, response::IntoResponse, routing::post};
use http::{Response, StatusCode, header};

use super::{ReloadError, Reloader};
use crate::{
    config::problem::{Problem, Problems},
    core::Core,
    http::{Body, api::Worker, rejection::Rejection},
};

/// The route. The scope `admin` is that of all routes which concern the instance.
pub fn router(reloader: &Arc<Reloader>) -> Router<Arc<Core>> {
    let reloader = Arc::clone(reloader);
    let answer = async move |worker: Worker, State(_): State<Arc<Core>>| {
        let by = format!("API key {}", worker.name);
        match reloader.reload(&by).await {
            Ok(reloaded) => Json(reloaded.json()).into_response(),
            Err(error) => refusal(&error),
        }
    };
    Router::new().route("/api/v1/reload", post(answer))
}

/// Answers a reload that changed nothing. Problems are listed beside the error.
fn refusal(error: &ReloadError) -> Response<Body> {
    let rejection = match error {
        ReloadError::Invalid(Problems(problems)) => {
            let s = if problems.len() == 1 { "" } else { "s" };
            let message = format!(
                "Nothing was reloaded: the configuration has {} problem{s}.",
                problems.len()
            );
            Rejection::configuration_invalid(message)
        }
        ReloadError::NothingToRead => Rejection::conflict(error.to_string()),
        ReloadError::Slow => Rejection::deadline(error.to_string()),
    };
    let ReloadError::Invalid(Problems(problems)) = error else { return rejection.response() };
    let mut body = rejection.body();
    body["problems"] = problems.iter().map(Problem::json).collect();
    let mut response = Response::new(Body::from(body.to_string()));
    *response.status_mut() = StatusCode::CONFLICT;
    let json = http::HeaderValue::from_static("application/json");
    response.headers_mut().insert(header::CONTENT_TYPE, json);
    response
}
