//! What the Hub and the network answer, in words that say what to do.

use hf_hub::HFError;
use reqwest::StatusCode;

use super::http::Trouble;
use super::settings::Settings;
use crate::failure::Failure;

/// How to give a token.
const TOKEN_HINT: &str = "log in with `hf auth login`, or give a token with --token or HF_TOKEN";

/// The Hub's refusal to give a model, or the file `name` of it; `code` is its X-Error-Code.
pub fn refusal(status: StatusCode, code: Option<&str>, settings: &Settings, id: &str, name: Option<&str>) -> Failure {
    let (endpoint, has_token) = (settings.endpoint_text(), settings.token.is_some());
    let page = format!("{endpoint}/{id}");
    match (status, code) {
        (_, Some("GatedRepo")) if has_token => {
            Failure::new(format!("{id} is gated, and the token has no access to it"))
                .with_hint(format!("ask for access at {page}, with the account that the token belongs to"))
        }
        (_, Some("GatedRepo")) => Failure::new(format!("{id} is gated: it is not given without a token"))
            .with_hint(format!("ask for access at {page}, then {TOKEN_HINT}")),
        (StatusCode::NOT_FOUND, Some("EntryNotFound")) => {
            Failure::new(format!("{id} has no file {}", name.unwrap_or_default())).with_hint(format!("look at {page}"))
        }
        // Without a token the Hub does not tell whether a model is private or not there.
        (StatusCode::UNAUTHORIZED, None | Some("RepoNotFound")) | (StatusCode::NOT_FOUND, _) if !has_token => {
            Failure::new(format!("there is no model {id} at {endpoint}, or it is private")).with_hint(format!(
                "check the name (ORGANISATION/MODEL), or name a folder that is there; for a private model, {TOKEN_HINT}"
            ))
        }
        (StatusCode::NOT_FOUND, _) => {
            Failure::new(format!("there is no model {id} at {endpoint}, or the token has no access to it"))
                .with_hint("check the name (ORGANISATION/MODEL), or name a folder that is there")
        }
        (StatusCode::UNAUTHORIZED, _) => {
            Failure::new(format!("{endpoint} does not accept the token (for {id})")).with_hint(TOKEN_HINT)
        }
        (StatusCode::FORBIDDEN, _) if has_token => Failure::new(format!("{endpoint} gives no access to {id}"))
            .with_hint(format!("look at {page}; the token may be one without the right to read")),
        (StatusCode::FORBIDDEN, _) => {
            Failure::new(format!("{endpoint} gives no access to {id} without a token")).with_hint(TOKEN_HINT)
        }
        _ => Failure::new(format!("{page}: the Hub answers {status}")).with_hint("try again later"),
    }
}

/// What an error of asking about a model's revision means.
pub fn of_info(error: HFError, settings: &Settings, id: &str, revision: &str) -> Trouble {
    let endpoint = settings.endpoint_text();
    let context = match &error {
        HFError::Request { source, .. } if source.is_decode() && !source.is_timeout() => {
            let failure = Failure::new(format!("{endpoint} does not answer as the Hub does"));
            return failure.with_hint("is HF_ENDPOINT right?").into();
        }
        HFError::Request { source, .. } if source.is_redirect() || source.is_builder() => {
            let failure =
                Failure::new(format!("{endpoint} redirects to where it cannot be followed: {}", cause(source)));
            return failure.with_hint("is HF_ENDPOINT right?").into();
        }
        HFError::Request { source, .. } => return Trouble::passing(cause(source)),
        HFError::RateLimited { retry_after, context } => {
            return Trouble::Passing { why: format!("it answers {}", context.status), pause: *retry_after };
        }
        HFError::RevisionNotFound { context: Some(context), .. } => {
            let is_main = revision == "main" && context.error_code.is_none();
            if context.error_code.as_deref() != Some("RepoNotFound") && !is_main {
                let hint =
                    format!("{endpoint}/{id}/tree/main lists branches and tags; a commit is named by its full hash");
                return Failure::new(format!("{id} has no revision {revision}")).with_hint(hint).into();
            }
            context
        }
        HFError::AuthRequired { context } | HFError::Forbidden { context } | HFError::Http { context } => context,
        _ => return Failure::new(format!("{endpoint}: {error}")).into(),
    };
    match context.status {
        status if is_passing(status) => Trouble::passing(format!("it answers {status}")),
        status => refusal(status, context.error_code.as_deref(), settings, id, None).into(),
    }
}

/// Whether an answer of this status may be another a moment later.
pub fn is_passing(status: StatusCode) -> bool {
    status.is_server_error() || [StatusCode::REQUEST_TIMEOUT, StatusCode::TOO_MANY_REQUESTS].contains(&status)
}

/// That the Hub could not be reached.
pub fn unreachable(error: &str, settings: &Settings) -> Failure {
    Failure::new(format!("{} cannot be reached: {error}", settings.endpoint_text())).with_hint(
        "check the connection, and HTTPS_PROXY, HTTP_PROXY or ALL_PROXY if one is set; a model that is whole in the \
         cache needs no network",
    )
}

/// The innermost cause of an error: the outer ones of an HTTP client say little.
pub fn cause(error: &(dyn std::error::Error + 'static)) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}
