//! What the Hub and the network answer, in words that say what to do.

use hf_hub::HFError;
use reqwest::StatusCode;

use super::settings::Settings;
use crate::failure::Failure;

/// How to give a token.
const TOKEN_HINT: &str = "log in with `hf auth login`, or give a token with --token or HF_TOKEN";

/// The Hub's refusal to give a model, or the file `name` of it; `code` is its X-Error-Code.
pub fn refusal(status: StatusCode, code: Option<&str>, settings: &Settings, id: &str, name: Option<&str>) -> Failure {
    let (endpoint, has_token) = (&settings.endpoint, settings.token.is_some());
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
        (StatusCode::FORBIDDEN, _) => Failure::new(format!("{endpoint} gives no access to {id}"))
            .with_hint(format!("look at {page}; the token may be one without the right to read")),
        _ => Failure::new(format!("{page}: the Hub answers {status}")).with_hint("try again later"),
    }
}

/// An error of asking about a model's revision; `None` when the Hub could not be reached at all.
pub fn of_info(error: HFError, settings: &Settings, id: &str, revision: &str) -> Option<Failure> {
    let context = match &error {
        HFError::Request { source, .. } if source.is_decode() => {
            let message = format!("{}: does not answer as the Hub does: {}", settings.endpoint, cause(source));
            return Some(Failure::new(message).with_hint("is HF_ENDPOINT right?"));
        }
        HFError::Request { .. } => return None,
        HFError::RevisionNotFound { context: Some(context), .. } => {
            if context.error_code.as_deref() != Some("RepoNotFound") {
                let page = format!("{}/{id}", settings.endpoint);
                let hint = format!("{page}/tree/main lists branches and tags; a commit is named by its full hash");
                return Some(Failure::new(format!("{id} has no revision {revision}")).with_hint(hint));
            }
            context
        }
        HFError::AuthRequired { context }
        | HFError::Forbidden { context }
        | HFError::RateLimited { context, .. }
        | HFError::Http { context } => context,
        _ => return Some(Failure::new(format!("{}: {error}", settings.endpoint))),
    };
    if matches!(context.status, StatusCode::TOO_MANY_REQUESTS) || context.status.is_server_error() {
        let message = format!("{} answers {} each time", settings.endpoint, context.status);
        return Some(Failure::new(message).with_hint("try again in some minutes; --offline uses what is in the cache"));
    }
    Some(refusal(context.status, context.error_code.as_deref(), settings, id, None))
}

/// That the Hub could not be reached.
pub fn unreachable(error: &str, settings: &Settings) -> Failure {
    Failure::new(format!("{} cannot be reached: {error}", settings.endpoint)).with_hint(
        "check the connection, and HTTPS_PROXY if there is a proxy; a model that is in the cache needs no network",
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
