//! HTTPS, for clients that speak nothing else, such as IBM's SDK.

use crate::{Error, Result};
use std::path::Path;
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer, pem};
use tokio_rustls::rustls::{self, ServerConfig};

/// A server's certificate with its key.
#[derive(Clone)]
pub struct Tls(pub(super) TlsAcceptor);

impl Tls {
    /// Reads a certificate chain and its private key, both PEM.
    ///
    /// # Errors
    /// A file that can't be read, that holds no such thing, or a key of another certificate, by its name.
    pub fn read(certificates: &Path, key: &Path) -> Result<Self> {
        let chain = CertificateDer::pem_file_iter(certificates)
            .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>);
        let chain = chain.map_err(|error| malformed(certificates, "a certificate", &error))?;
        if chain.is_empty() {
            return Err(malformed(certificates, "a certificate", &pem::Error::NoItemsFound));
        }
        let secret =
            PrivateKeyDer::from_pem_file(key).map_err(|error| malformed(key, "a private key", &error))?;
        let config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .map(|builder| builder.with_no_client_auth())
            .and_then(|builder| builder.with_single_cert(chain, secret));
        let unfit = |error: rustls::Error| Error::Checkpoint {
            path: key.to_path_buf(),
            problem: format!("expected the private key of {}, found {error}", certificates.display()),
        };
        Ok(Self(TlsAcceptor::from(Arc::new(config.map_err(unfit)?))))
    }
}

fn malformed(path: &Path, expected: &str, error: &pem::Error) -> Error {
    match error {
        pem::Error::Io(io) => Error::io(path)(std::io::Error::new(io.kind(), io.to_string())),
        other => Error::Checkpoint {
            path: path.to_path_buf(),
            problem: format!("expected {expected} in PEM form (-----BEGIN ...-----), found {other}"),
        },
    }
}
