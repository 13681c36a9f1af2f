//! HTTPS: a certificate and its key, in PEM files.

use crate::{Error, Result};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::ServerConfig;
use tokio_rustls::rustls::crypto::ring;
use tokio_rustls::rustls::pki_types::pem::PemObject;
use tokio_rustls::rustls::pki_types::{CertificateDer, PrivateKeyDer};

/// The files of a server's certificate and key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tls {
    /// A PEM file with the certificate, followed by its intermediate certificates.
    pub certificate: PathBuf,
    /// A PEM file with the private key.
    pub key: PathBuf,
}

impl Tls {
    /// Accepts connections over HTTPS.
    ///
    /// # Errors
    /// Returns an error if a file cannot be read or is not PEM, or if the key does not belong to the certificate.
    pub(super) fn acceptor(&self) -> Result<TlsAcceptor> {
        let failed = |path: &Path, problem: String| Error::Invalid(format!("{}: {problem}", path.display()));
        let pem = |problem| format!("expected a PEM file: {problem}");
        let certificates = CertificateDer::pem_file_iter(&self.certificate)
            .and_then(Iterator::collect::<std::result::Result<Vec<_>, _>>)
            .map_err(|error| failed(&self.certificate, pem(error)))?;
        if certificates.is_empty() {
            return Err(failed(&self.certificate, "expected a certificate in PEM form, found none".into()));
        }
        let key = PrivateKeyDer::from_pem_file(&self.key).map_err(|error| failed(&self.key, pem(error)))?;
        let mut config = ServerConfig::builder_with_provider(Arc::new(ring::default_provider()))
            .with_safe_default_protocol_versions()
            .and_then(|config| config.with_no_client_auth().with_single_cert(certificates, key))
            .map_err(|error| {
                failed(&self.key, format!("expected the key of {}: {error}", self.certificate.display()))
            })?;
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(TlsAcceptor::from(Arc::new(config)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn invalid_certificates_and_keys_are_rejected_by_file() {
        let fixture =
            |name: &str| Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tls").join(name);
        let (certificate, key) = (fixture("certificate.pem"), fixture("key.pem"));
        assert!(Tls { certificate: certificate.clone(), key: key.clone() }.acceptor().is_ok());
        for (certificate, key, word) in [
            (fixture("none.pem"), key.clone(), "none.pem"),
            (key.clone(), key.clone(), "found none"),
            (certificate.clone(), certificate.clone(), "certificate.pem: expected a PEM file"),
        ] {
            let error = Tls { certificate, key }.acceptor().map(drop).unwrap_err();
            assert!(error.is_bad_input() && error.to_string().contains(word), "{error}");
        }
    }
}
