//! HTTPS: a certificate and its key, in PEM files.

use crate::files::{write_atomically, write_privately};
use crate::{Error, Result};
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
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
    /// The certificate and key in `folder`. If there are none, they are made: for `host` and this machine's own names,
    /// signed by themselves.
    ///
    /// # Errors
    /// Returns an error if they can't be made or written.
    pub fn self_signed(folder: &Path, host: &str) -> Result<Self> {
        let files = Self { certificate: folder.join("certificate.pem"), key: folder.join("key.pem") };
        // The certificate is written last.
        if files.certificate.is_file() && files.key.is_file() {
            return Ok(files);
        }
        let failed = |error: rcgen::Error| Error::Invalid(format!("a certificate for {host}: {error}"));
        let mut names = vec!["localhost".to_owned(), "127.0.0.1".to_owned(), "::1".to_owned()];
        if !names.iter().any(|name| name == host) {
            names.push(host.to_owned());
        }
        let mut parameters = CertificateParams::new(names).map_err(failed)?;
        parameters.distinguished_name = DistinguishedName::new();
        parameters.distinguished_name.push(DnType::CommonName, "gneiss");
        let key = KeyPair::generate().map_err(failed)?;
        let certificate = parameters.self_signed(&key).map_err(failed)?;
        std::fs::create_dir_all(folder).map_err(Error::io(folder))?;
        write_privately(&files.key, |out| out.write_all(key.serialize_pem().as_bytes()))?;
        write_atomically(&files.certificate, |out| out.write_all(certificate.pem().as_bytes()))?;
        Ok(files)
    }

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
    fn self_signed_certificate_is_made_once() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("tls");
        let made = Tls::self_signed(&folder, "example.test").unwrap();
        assert!(made.acceptor().is_ok());
        let text = std::fs::read_to_string(&made.certificate).unwrap();
        assert_eq!(Tls::self_signed(&folder, "example.test").unwrap(), made);
        assert_eq!(std::fs::read_to_string(&made.certificate).unwrap(), text);
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(std::fs::metadata(&made.key).unwrap().permissions().mode() & 0o077, 0);
        }
    }

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
