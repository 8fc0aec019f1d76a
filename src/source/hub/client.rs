//! Requests to a hub, one at a time and blocking: redirects, retries, proxies, the token, the list of files.
//!
//! Redirects are followed here and not by the HTTP client: the token goes to the hub alone, each address has its own
//! proxy, and a question about a file ends at the hub, before the storage that its bytes come from.

use std::io::Read as _;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use hf_hub::Repo;
use serde::Deserialize;
use ureq::http::header::{AUTHORIZATION, CONTENT_LENGTH, ETAG, LINK, LOCATION, RANGE};
use ureq::http::{HeaderMap, HeaderName, Method, Request, Response, Uri};
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, Body, Proxy};

use super::failure::{Failure, Refusal};
use super::proxy::Proxies;
use super::store;

/// How often a request is repeated where the same one may succeed a moment later.
const REPEATS: u32 = 4;
/// Before the first repetition; twice as long before each further one.
const PAUSE: Duration = Duration::from_millis(200);
/// Redirects in a row.
const REDIRECTS: u32 = 10;
/// Pages of a list of files, at some hundred files each.
const PAGES: usize = 1000;
/// Bytes of such a page, and of what an error says.
const PAGE_BYTES: u64 = 64 << 20;
const MESSAGE_BYTES: u64 = 64 << 10;

/// A hub, and how it is asked.
pub(super) struct Client {
    /// Without a slash at its end.
    endpoint: String,
    token: Option<String>,
    user_agent: String,
    proxies: Proxies,
    /// How long a server may say nothing.
    stall: Duration,
    /// An agent for each proxy that was needed.
    agents: Mutex<Vec<(Option<Proxy>, Agent)>>,
}

/// What the hub says about a file without sending it.
#[derive(Debug)]
pub(super) struct About {
    /// Names the content, also in the cache: the git hash of a small file, the SHA-256 of a large one.
    pub(super) etag: String,
    /// The commit that the revision stands for.
    pub(super) commit: String,
    pub(super) size: Option<u64>,
}

/// An entry of the list of files.
#[derive(Debug, Deserialize)]
pub(super) struct Entry {
    /// `file` or `directory`.
    #[serde(rename = "type")]
    pub(super) kind: String,
    pub(super) path: String,
    #[serde(default)]
    pub(super) size: u64,
    /// Git's name for the content.
    #[serde(default)]
    pub(super) oid: String,
    pub(super) lfs: Option<Large>,
}

/// What the list says about a large file.
#[derive(Debug, Deserialize)]
pub(super) struct Large {
    /// SHA-256 of the content.
    #[serde(alias = "sha256")]
    pub(super) oid: Option<String>,
}

/// How far redirects are followed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Follow {
    Everywhere,
    WithinHub,
}

impl Client {
    pub(super) fn new(
        endpoint: String,
        token: Option<String>,
        user_agent: String,
        proxies: Proxies,
        stall: Duration,
    ) -> Self {
        Self { endpoint, token, user_agent, proxies, stall, agents: Mutex::default() }
    }

    /// Address of a file.
    fn address(&self, repo: &Repo, name: &str) -> String {
        format!("{}/{}/resolve/{}/{}", self.endpoint, repo.url(), repo.url_revision(), escaped(name, b"?#%"))
    }

    /// What the hub says about a file.
    ///
    /// # Errors
    /// Also where the answer lacks the commit or the name of the content, or has something there that cannot be a name
    /// in the cache. The commit of an answer that there is no such file comes with the failure.
    pub(super) fn about(&self, repo: &Repo, name: &str) -> Result<About, (Failure, Option<String>)> {
        let url = self.address(repo, name);
        let response = self.send(&Method::HEAD, &url, None, Follow::WithinHub).map_err(|e| (e, None))?;
        let headers = response.headers();
        let commit = header(headers, &X_REPO_COMMIT).filter(|c| store::may_be_commit(c)).map(str::to_owned);
        let status = response.status();
        if !status.is_success() && !status.is_redirection() {
            return Err((self.refusal(response, url), commit));
        }
        let etag = header(headers, &X_LINKED_ETAG).or_else(|| header(headers, &ETAG));
        let etag = etag.map(|e| e.strip_prefix("W/").unwrap_or(e).trim_matches('"')).filter(|e| plain(e));
        let odd = |what: &str| (Failure::Odd { what: what.to_owned(), url: url.clone() }, None);
        let etag = etag.ok_or_else(|| odd("the hub does not say what the content is called (`etag`)"))?.to_owned();
        let commit = commit.ok_or_else(|| odd("the hub does not say which commit this is (`x-repo-commit`)"))?;
        // The length of a redirect is not that of the file.
        let length = || header(headers, &CONTENT_LENGTH).filter(|_| status.is_success());
        let size = header(headers, &X_LINKED_SIZE).or_else(length).and_then(|s| s.parse().ok());
        Ok(About { etag, commit, size })
    }

    /// The bytes of a file, from `range.0` on and up to the one before `range.1`, or all of them.
    pub(super) fn content(&self, repo: &Repo, name: &str, range: Option<(u64, u64)>) -> Result<Content, Failure> {
        let url = self.address(repo, name);
        let response = self.send(&Method::GET, &url, range, Follow::Everywhere)?;
        if !response.status().is_success() {
            return Err(self.refusal(response, url));
        }
        let reader = response.into_body().into_with_config().limit(u64::MAX).reader();
        Ok(Content { reader, url, stall: self.stall })
    }

    /// The files and folders at the top of a repository.
    pub(super) fn list(&self, repo: &Repo) -> Result<Vec<Entry>, Failure> {
        let mut url = format!("{}/api/models/{}/tree/{}", self.endpoint, repo.url(), repo.url_revision());
        let mut all = Vec::new();
        for _ in 0..PAGES {
            let mut response = self.send(&Method::GET, &url, None, Follow::Everywhere)?;
            if !response.status().is_success() {
                return Err(self.refusal(response, url));
            }
            let next = response.headers().get_all(LINK).iter().filter_map(|v| v.to_str().ok()).find_map(next_page);
            let next = next.map(str::to_owned);
            let text = response.body_mut().with_config().limit(PAGE_BYTES).read_to_vec();
            let text = text.map_err(|e| self.broken(e, &url))?;
            let page: Vec<Entry> = serde_json::from_slice(&text).map_err(|e| {
                let what = format!("the list of files cannot be read: {e}");
                Failure::Odd { what, url: url.clone() }
            })?;
            all.extend(page);
            match next {
                Some(next) => url = Self::joined(&url, &next)?.to_string(),
                None => return Ok(all),
            }
        }
        Err(Failure::Odd { what: "the list of files does not end".to_owned(), url })
    }

    /// One request, repeated where that may help.
    fn send(
        &self,
        method: &Method,
        url: &str,
        range: Option<(u64, u64)>,
        follow: Follow,
    ) -> Result<Response<Body>, Failure> {
        let mut repeats = 0;
        loop {
            let answer = self.follow(method, url, range, follow);
            let passes = match &answer {
                Ok(response) => Refusal::passes(response.status().as_u16()),
                Err(failure) => failure.may_pass(),
            };
            if !passes || repeats == REPEATS {
                return answer;
            }
            std::thread::sleep(PAUSE * (1 << repeats));
            repeats += 1;
        }
    }

    /// One request and what it is redirected to.
    fn follow(
        &self,
        method: &Method,
        url: &str,
        range: Option<(u64, u64)>,
        follow: Follow,
    ) -> Result<Response<Body>, Failure> {
        let mut uri = Self::joined(url, url)?;
        for _ in 0..=REDIRECTS {
            let response = self.once(method, &uri, range)?;
            let place = match response.status().as_u16() {
                301 | 302 | 303 | 307 | 308 => header(response.headers(), &LOCATION),
                _ => None,
            };
            let Some(place) = place else { return Ok(response) };
            // The hub says what a file is called in the answer that leads to the storage.
            let named = [&X_LINKED_ETAG, &ETAG].into_iter().any(|name| response.headers().contains_key(name));
            if follow == Follow::WithinHub && named && has_server(place) {
                return Ok(response);
            }
            uri = Self::joined(&uri.to_string(), place)?;
        }
        Err(Failure::Odd { what: "redirected too often".to_owned(), url: url.to_owned() })
    }

    fn once(&self, method: &Method, uri: &Uri, range: Option<(u64, u64)>) -> Result<Response<Body>, Failure> {
        let mut request = Request::builder().method(method).uri(uri);
        if let Some(token) = self.token.as_deref().filter(|_| self.is_hub(uri)) {
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        if let Some((from, to)) = range {
            request = request.header(RANGE, format!("bytes={from}-{}", to.saturating_sub(1)));
        }
        let url = uri.to_string();
        let request = request.body(()).map_err(|e| self.broken(e.into(), &url))?;
        let agent = self.agent(self.proxies.for_request(uri)?);
        agent.run(request).map_err(|e| self.broken(e, &url))
    }

    /// Whether `uri` is at the server that the token is for.
    fn is_hub(&self, uri: &Uri) -> bool {
        let place = |uri: &Uri| {
            let secure = uri.scheme_str() == Some("https");
            let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
            Some((secure, uri.host()?.to_ascii_lowercase(), port))
        };
        let hub = self.endpoint.parse::<Uri>().ok().and_then(|hub| place(&hub));
        hub.is_some() && hub == place(uri)
    }

    fn agent(&self, proxy: Option<Proxy>) -> Agent {
        let mut agents = self.agents.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, agent)) = agents.iter().find(|(p, _)| *p == proxy) {
            return agent.clone();
        }
        let limit = Some(self.stall);
        let agent: Agent = Agent::config_builder()
            .http_status_as_error(false)
            .max_redirects(0)
            .max_redirects_will_error(false)
            .user_agent(&self.user_agent)
            // Lengths and ranges are those of the file itself.
            .accept_encoding("identity")
            // Those that the machine trusts, which may be the ones of a company.
            .tls_config(TlsConfig::builder().root_certs(RootCerts::PlatformVerifier).build())
            .proxy(proxy.clone())
            .timeout_resolve(limit)
            .timeout_connect(limit)
            .timeout_send_request(limit)
            .timeout_recv_response(limit)
            .timeout_per_read(limit)
            .timeout_per_write(limit)
            .build()
            .into();
        agents.push((proxy, agent.clone()));
        agent
    }

    /// `place` as seen from `base`.
    fn joined(base: &str, place: &str) -> Result<Uri, Failure> {
        let odd = || Failure::Odd { what: "an address cannot be read".to_owned(), url: base.to_owned() };
        let place = escaped(place, b"");
        if has_server(&place) && !place.starts_with("//") {
            return place.parse().map_err(|_| odd());
        }
        let uri: Uri = base.parse().map_err(|_| odd())?;
        let (scheme, authority) = uri.scheme_str().zip(uri.authority()).ok_or_else(odd)?;
        let address = match place.strip_prefix("//") {
            Some(rest) => format!("{scheme}://{rest}"),
            None if place.starts_with('/') => format!("{scheme}://{authority}{place}"),
            // Another scheme.
            None if place.split(['/', '?']).next().is_some_and(|p| p.contains(':')) => return Err(odd()),
            None => {
                let folder = uri.path().rsplit_once('/').map_or("", |(folder, _)| folder);
                format!("{scheme}://{authority}{folder}/{place}")
            }
        };
        address.parse().map_err(|_| odd())
    }

    fn broken(&self, error: ureq::Error, url: &str) -> Failure {
        match error {
            ureq::Error::Timeout(_) => Failure::Stalled(self.stall),
            error => Failure::Transport { error, url: url.to_owned() },
        }
    }

    /// What the answer says about itself, in its headers or as JSON.
    fn refusal(&self, mut response: Response<Body>, url: String) -> Failure {
        let text = |name| header(response.headers(), name).map(str::to_owned);
        let (code, message) = (text(&X_ERROR_CODE), text(&X_ERROR_MESSAGE));
        let message = message.or_else(|| {
            let text = response.body_mut().with_config().limit(MESSAGE_BYTES).read_to_vec().ok()?;
            let value: serde_json::Value = serde_json::from_slice(&text).ok()?;
            Some(value.get("error")?.as_str()?.to_owned())
        });
        Failure::Refused(Refusal { status: response.status().as_u16(), code, message, url })
    }
}

/// The bytes of a file as they come.
pub(super) struct Content {
    reader: ureq::BodyReader<'static>,
    url: String,
    stall: Duration,
}

impl Content {
    /// Reads some bytes into `buffer`: none where the answer ends.
    pub(super) fn read(&mut self, buffer: &mut [u8]) -> Result<usize, Failure> {
        loop {
            match self.reader.read(buffer) {
                Ok(n) => return Ok(n),
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => {
                    return Err(match ureq::Error::from(e) {
                        ureq::Error::Timeout(_) => Failure::Stalled(self.stall),
                        error => Failure::Transport { error, url: self.url.clone() },
                    });
                }
            }
        }
    }
}

const X_REPO_COMMIT: HeaderName = HeaderName::from_static("x-repo-commit");
const X_LINKED_ETAG: HeaderName = HeaderName::from_static("x-linked-etag");
const X_LINKED_SIZE: HeaderName = HeaderName::from_static("x-linked-size");
const X_ERROR_CODE: HeaderName = HeaderName::from_static("x-error-code");
const X_ERROR_MESSAGE: HeaderName = HeaderName::from_static("x-error-message");

fn header<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// Whether an address that may be relative names its server.
fn has_server(place: &str) -> bool {
    let lower = place.to_ascii_lowercase();
    ["http://", "https://", "//"].iter().any(|start| lower.starts_with(start))
}

/// Whether a word of the hub can be a name in the cache.
fn plain(word: &str) -> bool {
    !word.is_empty()
        && word.len() <= 128
        && !word.starts_with('.')
        && word
            .chars()
            .all(|c| c.is_ascii_graphic() && !matches!(c, '/' | '\\' | ':' | '*' | '?' | '"' | '<' | '>' | '|'))
}

/// `text` with everything escaped that cannot stand in an address, and the bytes in `more`.
fn escaped(text: &str, more: &[u8]) -> String {
    let mut out = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_graphic() && !br#""<>\^`{|}"#.contains(&byte) && !more.contains(&byte) {
            out.push(char::from(byte));
        } else {
            out.push_str(&format!("%{byte:02X}"));
        }
    }
    out
}

/// The address of the next page in a header `link`: `<https://hub/api/...>; rel="next"`.
fn next_page(link: &str) -> Option<&str> {
    link.split(',').find_map(|part| {
        let (place, kind) = part.split_once(';')?;
        let next = kind.split(';').any(|k| matches!(k.trim(), r#"rel="next""# | "rel=next"));
        place.trim().strip_prefix('<')?.strip_suffix('>').filter(|_| next)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn client(endpoint: &str) -> Client {
        Client::new(endpoint.to_owned(), None, "test".to_owned(), Proxies::default(), Duration::from_secs(1))
    }

    #[test]
    fn addresses_are_escaped_and_joined() {
        let client = client("https://hub/at");
        let repo = Repo::with_revision("org/name".to_owned(), hf_hub::RepoType::Model, "refs/pr/3".to_owned());
        assert_eq!(
            client.address(&repo, "a b#%.json"),
            "https://hub/at/org/name/resolve/refs%2Fpr%2F3/a%20b%23%25.json"
        );
        for (place, is) in [
            ("https://cdn/x y?s=%2F", "https://cdn/x%20y?s=%2F"),
            ("//cdn/x", "https://cdn/x"),
            ("/x?y", "https://hub:8/x?y"),
            ("x", "https://hub:8/a/x"),
        ] {
            assert_eq!(Client::joined("https://hub:8/a/b?c", place).expect(place).to_string(), is);
        }
        for bad in ["file:///etc/passwd", "http://", "ftp://x/y"] {
            assert!(Client::joined("https://hub/a", bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn the_token_is_for_the_hub_alone() {
        let client = client("https://Hub.example/at");
        let at = |address: &str| client.is_hub(&address.parse().expect("an address"));
        assert!(at("https://hub.example/x") && at("https://hub.example:443/x"));
        assert!(!at("http://hub.example/x") && !at("https://hub.example:444/x") && !at("https://cdn.hub.example/x"));
    }

    #[test]
    fn pages_and_names() {
        assert_eq!(next_page(r#"<https://h/a?c=1,2>; rel="prev""#), None);
        assert_eq!(next_page(r#"<https://h/a>; rel="prev", <https://h/b?c=1>; rel="next""#), Some("https://h/b?c=1"));
        assert!(
            plain("0123abc") && plain("5f3-abc+=") && !plain("") && !plain("..") && !plain("a/b") && !plain("a\\b")
        );
    }
}
