//! What the environment says about hubs, read as the Python client `huggingface_hub` reads it.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::Cache;
use ureq::http::Uri;

use crate::source::SourceError;

/// The public hub.
const PUBLIC: &str = "https://huggingface.co";
/// How long nothing may happen, where neither options nor `HF_HUB_DOWNLOAD_TIMEOUT` say.
const STALL: Duration = Duration::from_secs(60);

/// Looks a variable up. A parameter, so that tests need not change the environment of their process.
type Lookup<'a> = &'a dyn Fn(&str) -> Option<OsString>;

/// The variables of this process.
pub(super) fn process(name: &str) -> Option<OsString> {
    std::env::var_os(name)
}

/// The value of a variable that is set to something.
fn set(get: Lookup<'_>, name: &str) -> Option<String> {
    get(name)?.into_string().ok().map(|v| v.trim().to_owned()).filter(|v| !v.is_empty())
}

fn flag(get: Lookup<'_>, name: &str) -> bool {
    let value = set(get, name).unwrap_or_default().to_ascii_lowercase();
    matches!(value.as_str(), "1" | "on" | "yes" | "true")
}

/// A path out of a variable, `~` standing for the home folder.
fn path(get: Lookup<'_>, name: &str) -> Option<PathBuf> {
    let value = PathBuf::from(get(name).filter(|v| !v.is_empty())?);
    match value.strip_prefix("~") {
        Ok(rest) => Some(user_home(get).join(rest)),
        Err(_) => Some(value),
    }
}

fn user_home(get: Lookup<'_>) -> PathBuf {
    let named = get("HOME").filter(|v| !v.is_empty()).map(PathBuf::from);
    named.or_else(std::env::home_dir).unwrap_or_else(std::env::temp_dir)
}

/// `HF_HOME`, else `$XDG_CACHE_HOME/huggingface`, else `~/.cache/huggingface`.
fn hub_home(get: Lookup<'_>) -> PathBuf {
    path(get, "HF_HOME").unwrap_or_else(|| {
        let caches = path(get, "XDG_CACHE_HOME").unwrap_or_else(|| user_home(get).join(".cache"));
        caches.join("huggingface")
    })
}

/// `HF_HUB_CACHE`, else `HUGGINGFACE_HUB_CACHE`, else `hub` in [`hub_home`].
pub(super) fn cache(get: Lookup<'_>) -> PathBuf {
    let named = path(get, "HF_HUB_CACHE").or_else(|| path(get, "HUGGINGFACE_HUB_CACHE"));
    named.unwrap_or_else(|| hub_home(get).join("hub"))
}

/// `HF_TOKEN`, else what the file `HF_TOKEN_PATH` holds, else the file that `hf auth login` writes. Nothing where
/// `HF_HUB_DISABLE_IMPLICIT_TOKEN` asks for that, and nothing that cannot be sent.
pub(super) fn token(get: Lookup<'_>) -> Option<String> {
    if flag(get, "HF_HUB_DISABLE_IMPLICIT_TOKEN") {
        return None;
    }
    let from_file = |file: &Path| {
        let text = fs_err::read_to_string(file).ok()?;
        Some(text.trim().to_owned()).filter(|t| !t.is_empty())
    };
    set(get, "HF_TOKEN")
        .or_else(|| from_file(&path(get, "HF_TOKEN_PATH")?))
        .or_else(|| Cache::new(hub_home(get).join("hub")).token())
        .filter(|token| token.bytes().all(|b| b.is_ascii_graphic()))
}

/// Address of the hub, without a slash at its end: the option, else `HF_ENDPOINT`, else the public hub.
///
/// # Errors
/// [`SourceError::Endpoint`] where what is set is not an address.
pub(super) fn endpoint(option: Option<&str>, get: Lookup<'_>) -> Result<String, SourceError> {
    let (name, value) = match (option, get("HF_ENDPOINT")) {
        (Some(value), _) => ("hub_endpoint", value.to_owned()),
        (None, Some(value)) => ("HF_ENDPOINT", value.to_string_lossy().into_owned()),
        (None, None) => return Ok(PUBLIC.to_owned()),
    };
    let address = value.trim_end_matches('/');
    let fault = |reason: &str| {
        // What stands before `@` may be a password.
        let shown = value.rsplit('@').next().unwrap_or_default().to_owned();
        Err(SourceError::Endpoint { name, value: shown, reason: reason.to_owned() })
    };
    if address.is_empty() {
        return fault("it is empty");
    }
    let lower = value.to_ascii_lowercase();
    if !lower.starts_with("https://") && !lower.starts_with("http://") {
        return fault("it does not begin with `https://` or `http://`");
    }
    match address.parse::<Uri>() {
        Ok(uri) if uri.query().is_some() => fault("it has a query"),
        Ok(uri) if uri.scheme().is_some() && uri.host().is_some_and(|h| !h.is_empty()) => Ok(address.to_owned()),
        _ => fault("it is not the address of a server"),
    }
}

/// `HF_HUB_DOWNLOAD_TIMEOUT` in seconds.
pub(super) fn stall(get: Lookup<'_>) -> Duration {
    let seconds = set(get, "HF_HUB_DOWNLOAD_TIMEOUT").and_then(|v| v.parse().ok());
    seconds.and_then(|s| Duration::try_from_secs_f64(s).ok()).filter(|d| !d.is_zero()).unwrap_or(STALL)
}

/// `HF_HUB_OFFLINE`.
pub(super) fn offline(get: Lookup<'_>) -> bool {
    flag(get, "HF_HUB_OFFLINE")
}

/// What requests say about the program that makes them.
pub(super) fn user_agent(get: Lookup<'_>) -> String {
    let own = concat!(env!("CARGO_PKG_NAME"), "/", env!("CARGO_PKG_VERSION"));
    let origin = set(get, "HF_HUB_USER_AGENT_ORIGIN").filter(|o| o.bytes().all(|b| matches!(b, b' '..=b'~')));
    origin.map_or_else(|| own.to_owned(), |origin| format!("{own}; {origin}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lookup<'a>(pairs: &'a [(&'a str, &'a str)]) -> impl Fn(&str) -> Option<OsString> + 'a {
        move |name| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(*v))
    }

    #[test]
    fn the_cache_is_where_python_has_it() {
        let of = |pairs: &[(&str, &str)]| cache(&lookup(&[pairs, &[("HOME", "/u")]].concat()));
        assert_eq!(of(&[]), Path::new("/u/.cache/huggingface/hub"));
        assert_eq!(of(&[("XDG_CACHE_HOME", "/x")]), Path::new("/x/huggingface/hub"));
        assert_eq!(of(&[("XDG_CACHE_HOME", "/x"), ("HF_HOME", "~/h")]), Path::new("/u/h/hub"));
        assert_eq!(of(&[("HF_HOME", "/h"), ("HUGGINGFACE_HUB_CACHE", "/old")]), Path::new("/old"));
        assert_eq!(of(&[("HF_HUB_CACHE", "/c"), ("HUGGINGFACE_HUB_CACHE", "/old")]), Path::new("/c"));
        assert_eq!(of(&[("HF_HUB_CACHE", ""), ("HF_HOME", "")]), Path::new("/u/.cache/huggingface/hub"));
    }

    #[test]
    fn tokens_come_from_the_nearest_place() {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let (home, file) = (dir.path().display().to_string(), dir.path().join("other"));
        let of = |pairs: &[(&str, &str)]| token(&lookup(&[pairs, &[("HF_HOME", home.as_str())]].concat()));
        assert_eq!(of(&[]), None);
        fs_err::write(dir.path().join("token"), "hf_stored\n").expect("written");
        fs_err::write(&file, " hf_file\n").expect("written");
        let file = file.display().to_string();
        assert_eq!(of(&[]).as_deref(), Some("hf_stored"));
        // The cache may be elsewhere; the token stays in HF_HOME.
        assert_eq!(of(&[("HF_HUB_CACHE", "/c")]).as_deref(), Some("hf_stored"));
        assert_eq!(of(&[("HF_TOKEN_PATH", &file)]).as_deref(), Some("hf_file"));
        assert_eq!(of(&[("HF_TOKEN_PATH", "/no/such/file")]).as_deref(), Some("hf_stored"));
        assert_eq!(of(&[("HF_TOKEN_PATH", &file), ("HF_TOKEN", "hf_set\n")]).as_deref(), Some("hf_set"));
        assert_eq!(of(&[("HF_TOKEN", " ")]).as_deref(), Some("hf_stored"));
        assert_eq!(of(&[("HF_TOKEN", "two words")]), None);
        assert_eq!(of(&[("HF_TOKEN", "hf_set"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1")]), None);
        assert_eq!(of(&[("HF_TOKEN", "hf_set"), ("HF_HUB_DISABLE_IMPLICIT_TOKEN", "0")]).as_deref(), Some("hf_set"));
    }

    #[test]
    fn an_endpoint_is_an_address() {
        let of = |value: &str| endpoint(None, &lookup(&[("HF_ENDPOINT", value)]));
        assert_eq!(endpoint(None, &lookup(&[])).expect("the public hub"), PUBLIC);
        for (good, is) in [
            ("https://hub.example", "https://hub.example"),
            ("HTTP://127.0.0.1:80/", "HTTP://127.0.0.1:80"),
            ("https://[::1]:8443/api/hub//", "https://[::1]:8443/api/hub"),
        ] {
            assert_eq!(of(good).expect(good), is);
        }
        for bad in
            ["", "/", "hub.example", "hub.example:8080", "//hub.example", "file:///tmp", "https://", "https://a b"]
        {
            let error = of(bad).expect_err(bad).to_string();
            assert!(error.contains("HF_ENDPOINT") && error.contains("hint:"), "{bad}: {error}");
        }
        let error = of("user:secret@hub.example").expect_err("no scheme").to_string();
        assert!(error.contains("hub.example") && !error.contains("secret"), "{error}");
        // An option goes first, and is what is named then.
        let error = endpoint(Some("hub"), &lookup(&[("HF_ENDPOINT", PUBLIC)])).expect_err("no scheme").to_string();
        assert!(error.contains("hub_endpoint"), "{error}");
    }

    #[test]
    fn times_and_flags() {
        let of = |value| stall(&lookup(&[("HF_HUB_DOWNLOAD_TIMEOUT", value)]));
        assert_eq!(of("2.5"), Duration::from_millis(2500));
        for odd in ["", "0", "-1", "nan", "1e300", "soon"] {
            assert_eq!(of(odd), STALL, "{odd}");
        }
        assert_eq!(
            ["1", "TRUE", "yes", "0", "", "off"].map(|v| offline(&lookup(&[("HF_HUB_OFFLINE", v)]))),
            [true, true, true, false, false, false]
        );
    }
}
