//! Where a server listens: an address or a name with a port.

use anyhow::Context;
use std::io::ErrorKind;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::str::FromStr;
use tokio::net::TcpListener;

/// Number of attempts to find a port that is free at all addresses of a name.
const TRIES: usize = 16;

/// `HOST:PORT` of the command line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Listen {
    /// A name or an address, without brackets.
    host: String,
    /// The port; 0 chooses a free one.
    port: u16,
}

impl FromStr for Listen {
    type Err = String;

    fn from_str(given: &str) -> Result<Self, String> {
        let failed = |hint: String| format!("expected HOST:PORT, as 127.0.0.1:8080; {hint}");
        if let Some((_, rest)) = given.split_once("://") {
            return Err(failed(format!("write {}", rest.trim_end_matches('/'))));
        }
        if given.parse::<u16>().is_ok() {
            return Err(failed(format!("for this machine alone write 127.0.0.1:{given}")));
        }
        if given.parse::<IpAddr>().is_ok_and(|address| address.is_ipv6()) {
            return Err(failed(format!("an IPv6 address stands in brackets: write [{given}]:8080")));
        }
        let Some((host, port)) = given.rsplit_once(':') else {
            return Err(failed(format!("write {given}:8080")));
        };
        let port = port.parse().map_err(|_| failed(format!("found no port from 0 to 65535 in {port:?}")))?;
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']'));
        if let Some(inside) = bare {
            let no_address = || failed(format!("found no IPv6 address in {inside:?}"));
            inside.parse::<std::net::Ipv6Addr>().map_err(|_| no_address())?;
        } else if host.contains(':') {
            return Err(failed(format!("an IPv6 address stands in brackets: write [{host}]:{port}")));
        }
        if matches!(host, "" | "*") {
            let hint =
                format!("write 127.0.0.1:{port} for this machine alone, or 0.0.0.0:{port} for others too");
            return Err(failed(hint));
        }
        Ok(Self { host: bare.unwrap_or(host).to_owned(), port })
    }
}

impl Listen {
    /// The name or address.
    pub fn host(&self) -> &str {
        &self.host
    }

    /// Listens on every address of the host, on one port; IPv4 first.
    ///
    /// # Errors
    /// Returns an error if the name has no address, or the port is in use or not permitted.
    pub async fn bind(&self) -> anyhow::Result<Vec<TcpListener>> {
        let Self { host, port } = self;
        let named = || format!("--listen {host}:{port}");
        let mut addresses: Vec<IpAddr> = (host.as_str(), 0)
            .to_socket_addrs()
            .with_context(|| format!("{}: looking for the address of {host}", named()))?
            .map(|address| address.ip())
            .collect();
        addresses.sort_by_key(IpAddr::is_ipv6);
        addresses.dedup();
        for attempt in 1.. {
            match bind_all(&addresses, self.port).await {
                // The port is free at one address and in use at another.
                Err(error) if error.kind() == ErrorKind::AddrInUse && *port == 0 && attempt < TRIES => {}
                bound => return bound.with_context(named),
            }
        }
        unreachable!("the last attempt returns")
    }
}

/// A listener for each address that this machine has, all on one port.
async fn bind_all(addresses: &[IpAddr], mut port: u16) -> std::io::Result<Vec<TcpListener>> {
    let (mut bound, mut missing) = (Vec::new(), None);
    for ip in addresses {
        match TcpListener::bind(SocketAddr::new(*ip, port)).await {
            Ok(listener) => {
                port = listener.local_addr()?.port();
                bound.push(listener);
            }
            // A name may have an address of a protocol that this machine does not have.
            Err(error) if matches!(error.kind(), ErrorKind::AddrNotAvailable | ErrorKind::Unsupported) => {
                missing = Some(error);
            }
            Err(error) => return Err(error),
        }
    }
    match missing {
        Some(error) if bound.is_empty() => Err(error),
        _ => Ok(bound),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_addresses_are_read() {
        for (given, host, port) in [
            ("127.0.0.1:8080", "127.0.0.1", 8080),
            ("localhost:0", "localhost", 0),
            ("[::1]:0", "::1", 0),
            ("[::]:443", "::", 443),
            ("gpu-1.example:65535", "gpu-1.example", 65535),
        ] {
            assert_eq!(given.parse(), Ok(Listen { host: host.to_owned(), port }), "{given}");
        }
        for (given, words) in [
            ("8080", "write 127.0.0.1:8080"),
            (":8080", "0.0.0.0:8080"),
            ("*:8080", "0.0.0.0:8080"),
            ("localhost", "write localhost:8080"),
            ("http://localhost:8080/", "write localhost:8080"),
            ("::1", "write [::1]:8080"),
            ("fe80::1:x:80", "write [fe80::1:x]:80"),
            ("[localhost]:80", "no IPv6 address"),
            ("localhost:99999", "from 0 to 65535"),
            ("localhost:http", "from 0 to 65535"),
        ] {
            let problem = given.parse::<Listen>().unwrap_err();
            assert!(problem.contains(words), "{given}: {words} is not in {problem}");
        }
    }

    #[test]
    fn a_name_is_bound_at_all_of_its_addresses_on_one_port() {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let bound = "localhost:0".parse::<Listen>().unwrap().bind().await.unwrap();
            let addresses: Vec<SocketAddr> = bound.iter().map(|bound| bound.local_addr().unwrap()).collect();
            assert!(!addresses.is_empty() && addresses.iter().all(|address| address.ip().is_loopback()));
            let port = addresses[0].port();
            assert!(port > 0 && addresses.iter().all(|address| address.port() == port), "{addresses:?}");
            let taken = format!("127.0.0.1:{port}").parse::<Listen>().unwrap().bind().await.unwrap_err();
            assert!(format!("{taken:#}").contains(&format!("--listen 127.0.0.1:{port}")), "{taken:#}");
            let nowhere = "nowhere.invalid:0".parse::<Listen>().unwrap().bind().await.unwrap_err();
            assert!(format!("{nowhere:#}").contains("the address of nowhere.invalid"), "{nowhere:#}");
        });
    }
}
