//! Which proxy a request goes through, by the variables that `curl` reads: `HTTPS_PROXY` or `HTTP_PROXY` by the kind of
//! address, else `ALL_PROXY`, each also in small letters, but for the hosts of `NO_PROXY`.

use std::ffi::OsString;
use std::net::IpAddr;

use ureq::Proxy;
use ureq::http::Uri;

use super::failure::Failure;

/// Proxies of the environment.
#[derive(Debug, Clone, Default)]
pub(super) struct Proxies {
    /// Variable and value, for `http://`.
    plain: Option<(&'static str, String)>,
    /// Variable and value, for `https://`.
    secure: Option<(&'static str, String)>,
    exempt: Vec<Exempt>,
}

/// An entry of `NO_PROXY`.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Exempt {
    All,
    /// Addresses whose first bits are these.
    Net(IpAddr, u8),
    /// A host and all below it.
    Domain(String),
}

impl Proxies {
    pub(super) fn of(get: &dyn Fn(&str) -> Option<OsString>) -> Self {
        let value = |name| get(name)?.into_string().ok().map(|v| v.trim().to_owned()).filter(|v| !v.is_empty());
        let first = |names: &[&'static str]| names.iter().find_map(|name| Some((*name, value(name)?)));
        // A server hands the header `Proxy:` of its visitors to CGI programs as HTTP_PROXY.
        let plain: &[_] = if get("REQUEST_METHOD").is_some() { &["http_proxy"] } else { &["HTTP_PROXY", "http_proxy"] };
        let all = first(&["ALL_PROXY", "all_proxy"]);
        let exempt = first(&["NO_PROXY", "no_proxy"]).map(|(_, list)| list).unwrap_or_default();
        Self {
            plain: first(plain).or_else(|| all.clone()),
            secure: first(&["HTTPS_PROXY", "https_proxy"]).or(all),
            exempt: exempt.split(',').filter_map(Exempt::read).collect(),
        }
    }

    /// The proxy for `uri`.
    pub(super) fn for_request(&self, uri: &Uri) -> Result<Option<Proxy>, Failure> {
        let host = uri.host().unwrap_or_default();
        if self.exempt.iter().any(|e| e.holds(host)) {
            return Ok(None);
        }
        let wanted = if uri.scheme_str() == Some("https") { &self.secure } else { &self.plain };
        match wanted {
            Some((name, value)) => match Proxy::new(value) {
                Ok(proxy) => Ok(Some(proxy)),
                Err(_) => Err(Failure::Proxy(name)),
            },
            None if cfg!(windows) && self.plain.is_none() && self.secure.is_none() => Ok(Proxy::try_from_env()),
            None => Ok(None),
        }
    }
}

impl Exempt {
    fn read(entry: &str) -> Option<Self> {
        let entry = entry.trim();
        if entry == "*" {
            return Some(Exempt::All);
        }
        let (address, bits) = entry.split_once('/').map_or((entry, None), |(a, b)| (a, Some(b)));
        if let Ok(address) = bare(address).parse::<IpAddr>() {
            let most = if address.is_ipv4() { 32 } else { 128 };
            let bits = bits.map_or(Some(most), |b| b.parse().ok().filter(|b| *b <= most))?;
            return Some(Exempt::Net(address, bits));
        }
        let domain = entry.trim_start_matches('*').trim_start_matches('.').to_ascii_lowercase();
        (!domain.is_empty()).then_some(Exempt::Domain(domain))
    }

    fn holds(&self, host: &str) -> bool {
        match self {
            Exempt::All => true,
            Exempt::Net(net, bits) => match (net, bare(host).parse()) {
                (IpAddr::V4(net), Ok(IpAddr::V4(host))) => {
                    (net.to_bits() ^ host.to_bits()).checked_shr(32 - u32::from(*bits)).unwrap_or(0) == 0
                }
                (IpAddr::V6(net), Ok(IpAddr::V6(host))) => {
                    (net.to_bits() ^ host.to_bits()).checked_shr(128 - u32::from(*bits)).unwrap_or(0) == 0
                }
                _ => false,
            },
            Exempt::Domain(domain) => {
                let host = host.to_ascii_lowercase();
                host.strip_suffix(domain.as_str()).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
            }
        }
    }
}

/// An IPv6 address without its brackets.
fn bare(host: &str) -> &str {
    host.strip_prefix('[').and_then(|h| h.strip_suffix(']')).unwrap_or(host)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(pairs: &[(&str, &str)], address: &str) -> Option<String> {
        let get = |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, v)| OsString::from(*v));
        let uri = address.parse().expect("an address");
        let proxy = Proxies::of(&get).for_request(&uri).expect("proxies");
        proxy.map(|p| format!("{}:{}", p.host(), p.port()))
    }

    #[test]
    fn the_kind_of_address_chooses() {
        let both = [("HTTP_PROXY", "http://plain:1"), ("https_proxy", "secure:2"), ("ALL_PROXY", "socks5h://all:3")];
        assert_eq!(chosen(&both, "http://hub/x").as_deref(), Some("plain:1"));
        assert_eq!(chosen(&both, "https://hub/x").as_deref(), Some("secure:2"));
        assert_eq!(chosen(&both[2..], "https://hub/x").as_deref(), Some("all:3"));
        // One for plain addresses is not one for the others.
        assert_eq!(chosen(&both[..1], "https://hub/x"), None);
        assert_eq!(chosen(&[("HTTP_PROXY", "plain:1"), ("REQUEST_METHOD", "GET")], "http://hub/x"), None);
        assert_eq!(chosen(&[("HTTPS_PROXY", "")], "https://hub/x"), None);
        let get = |name: &str| (name == "HTTPS_PROXY").then(|| OsString::from("gopher://x"));
        let refused = Proxies::of(&get).for_request(&"https://hub".parse().expect("an address"));
        assert!(matches!(refused, Err(Failure::Proxy("HTTPS_PROXY"))));
    }

    #[test]
    fn hosts_can_be_exempt() {
        let exempt = |list: &str, host: &str| {
            chosen(&[("HTTPS_PROXY", "p:1"), ("NO_PROXY", list)], &format!("https://{host}/x")).is_none()
        };
        for (list, host) in [
            ("*", "hub.example"),
            ("hub.example", "hub.example"),
            ("a, HUB.example", "hub.Example:8080"),
            ("example", "hub.example"),
            (".hub.example", "hub.example"),
            ("*.example", "hub.example"),
            ("127.0.0.1", "127.0.0.1:9"),
            ("10.0.0.0/8", "10.200.3.4"),
            ("0.0.0.0/0", "1.2.3.4"),
            ("fd00::/8", "[fd12::1]"),
            ("[::1]", "[::1]:8080"),
        ] {
            assert!(exempt(list, host), "{list} {host}");
        }
        for (list, host) in [
            ("", "hub.example"),
            ("ample", "hub.example"),
            ("sub.hub.example", "hub.example"),
            ("10.0.0.0/8", "11.0.0.1"),
            ("10.0.0.0/8", "hub.10"),
            ("10.0.0.0/99", "10.0.0.1"),
            ("::/0", "1.2.3.4"),
        ] {
            assert!(!exempt(list, host), "{list} {host}");
        }
    }
}
