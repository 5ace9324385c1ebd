//! Sources from the network: into a file of the pool that outlives a failure, and goes on where it ended.
//!
//! ```text
//! <pool>/.vmctl/downloads/<digest>.part   what has come so far; locked while somebody adds to it
//! <pool>/.vmctl/downloads/<digest>.from   which version of which URL that is
//! ```
//!
//! What was fetched counts only once its digest is the declared one, so neither the server nor who answers
//! in its place can make another image of it.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::fd::OwnedFd;
use std::time::{Duration, SystemTime};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};
use sha2::Digest as _;
use ureq::http::{HeaderMap, StatusCode, Uri};
use ureq::tls::{PemItem, RootCerts, TlsConfig, parse_pem};

use super::ProgressHook;
use super::copy::{self, BUFFER_BYTES, Meter};
use super::directory::{FILE_MODE, PoolDirectory};
use super::space::Space;
use crate::host::error::StepError;
use crate::host::linux::ofd::{self, Lock};
use crate::name::Sha256;

/// How long a server may say nothing.
const SILENCE_MAX: Duration = Duration::from_secs(60);
const CONNECT_TIMEOUT: Duration = Duration::from_secs(30);
/// Attempts in a row that brought nothing.
const FRUITLESS_MAX: u32 = 4;
const PAUSE: Duration = Duration::from_millis(500);
/// What nobody came back for is removed.
const ABANDONED: Duration = Duration::from_secs(7 * 24 * 3600);
/// The host's own trust store. Where there is none, Mozilla's list that the program was built with.
const TRUST_STORES: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/ca-bundle.pem"];

#[derive(Default, PartialEq, Eq, Serialize, Deserialize)]
struct From {
    url: String,
    /// A strong `ETag`, or `Last-Modified`.
    validator: Option<String>,
}

/// A file that was fetched and has the declared digest. It stays until it is [`Downloaded::remove`]d.
pub struct Downloaded {
    directory: OwnedFd,
    names: [String; 2],
    pub file: File,
    pub bytes: u64,
}

impl Downloaded {
    pub fn remove(self) {
        for name in &self.names {
            // What can't be removed is found whole by the next one who wants it, or removed with age.
            let _ = rustix::fs::unlinkat(&self.directory, name, AtFlags::empty());
        }
    }
}

pub fn fetch(
    pool: &PoolDirectory,
    url: &str,
    sha256: Sha256,
    what: &str,
    hook: Option<&ProgressHook>,
) -> Result<Downloaded, StepError> {
    let failed = |errno: Errno| StepError::failed(what, errno);
    let directory = pool.downloads().map_err(failed)?;
    remove_abandoned(&directory).map_err(failed)?;
    let names = [format!("{sha256}.part"), format!("{sha256}.from")];
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(&directory, &names[0], flags, FILE_MODE).map_err(failed)?);
    if !ofd::try_lock(&file, Lock::Exclusive).map_err(failed)? {
        return Err(StepError::failed(what, "another process fetches it already"));
    }
    let path = pool.path.join(".vmctl/downloads").join(&names[0]);
    let part = Part { pool, directory, names, file, url, what, meter: Meter::new(hook, path, 0) };
    part.fetch(sha256)
}

fn remove_abandoned(directory: &OwnedFd) -> Result<(), Errno> {
    for name in super::directory::regular_names(directory)? {
        let stat = match rustix::fs::statat(directory, &name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(errno) => return Err(errno),
        };
        let modified = SystemTime::UNIX_EPOCH + Duration::from_secs(stat.st_mtime.max(0) as u64);
        if modified.elapsed().is_ok_and(|age| age > ABANDONED) {
            let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = rustix::fs::openat(directory, &name, flags, Mode::empty())?;
            if ofd::try_lock(&file, Lock::Exclusive)? {
                rustix::fs::unlinkat(directory, &name, AtFlags::empty())?;
            }
        }
    }
    Ok(())
}

struct Part<'a> {
    pool: &'a PoolDirectory,
    directory: OwnedFd,
    names: [String; 2],
    file: File,
    url: &'a str,
    what: &'a str,
    meter: Meter<'a>,
}

/// What has come, and its digest so far.
struct Progress {
    bytes: u64,
    digest: sha2::Sha256,
}

enum Stop {
    /// Another attempt may go on.
    Lost(String),
    /// It doesn't help to ask again.
    Refused(String),
    Local(io::Error),
}

impl Part<'_> {
    fn fetch(mut self, sha256: Sha256) -> Result<Downloaded, StepError> {
        let what = self.what;
        let space = Space::for_writing(self.pool, 0);
        let local = |error: io::Error| space.explain(what, error);
        let mut resumed = false;
        let mut progress = self.take_up(&mut resumed).map_err(local)?;
        loop {
            self.rest(&mut progress, &space)?;
            let found = Sha256(progress.digest.clone().finalize().into());
            if found == sha256 {
                self.file.sync_all().map_err(local)?;
                let Self { directory, names, file, .. } = self;
                return Ok(Downloaded { directory, names, file, bytes: progress.bytes });
            }
            self.restart(&mut progress).map_err(local)?;
            // The parts may have been of two versions, which nobody told.
            if !std::mem::take(&mut resumed) {
                return Err(StepError::Failed {
                    what: what.to_owned(),
                    why: format!(
                        "what {} gave has the SHA-256 digest {found}, and {sha256} is declared",
                        self.url
                    ),
                    hint: Some(
                        "did its publisher replace it? Declare the digest that he publishes now".into(),
                    ),
                });
            }
        }
    }

    /// What an earlier run left, if it was of this URL.
    fn take_up(&mut self, resumed: &mut bool) -> io::Result<Progress> {
        let mut progress = Progress { bytes: 0, digest: sha2::Sha256::new() };
        if self.read_from().url != self.url {
            self.restart(&mut progress)?;
            return Ok(progress);
        }
        let bytes = self.file.metadata()?.len();
        let mut buffer = vec![0; BUFFER_BYTES];
        while progress.bytes < bytes {
            let count = (bytes - progress.bytes).min(BUFFER_BYTES as u64) as usize;
            copy::read_exact(&self.file, &mut buffer[..count], progress.bytes)?;
            progress.digest.update(&buffer[..count]);
            progress.bytes += count as u64;
        }
        *resumed = bytes > 0;
        Ok(progress)
    }

    fn restart(&mut self, progress: &mut Progress) -> io::Result<()> {
        self.file.set_len(0)?;
        *progress = Progress { bytes: 0, digest: sha2::Sha256::new() };
        Ok(())
    }

    /// Asks until there is nothing more to come.
    fn rest(&mut self, progress: &mut Progress, space: &Space) -> Result<(), StepError> {
        let agent = agent(self.url);
        let mut fruitless = 0;
        loop {
            let before = progress.bytes;
            let lost = match self.attempt(&agent, progress) {
                Ok(()) => return Ok(()),
                Err(Stop::Lost(why)) => why,
                Err(Stop::Refused(why)) => return Err(StepError::failed(self.what, why)),
                Err(Stop::Local(error)) => return Err(space.explain(self.what, error)),
            };
            fruitless = if progress.bytes > before { 0 } else { fruitless + 1 };
            if fruitless == FRUITLESS_MAX {
                return Err(StepError::Failed {
                    what: self.what.to_owned(),
                    why: format!("fetch {}: {lost}", self.url),
                    hint: Some(match progress.bytes {
                        0 => "is the server to be reached from here?".to_owned(),
                        bytes => format!("apply again: it goes on after the {bytes} bytes that have come"),
                    }),
                });
            }
            std::thread::sleep(PAUSE * fruitless.max(1));
        }
    }

    fn attempt(&mut self, agent: &ureq::Agent, progress: &mut Progress) -> Result<(), Stop> {
        let from = self.read_from();
        // Bytes as they are on the server, or the range would be one of something else.
        let mut request = agent.get(self.url).header("accept-encoding", "identity");
        if progress.bytes > 0 {
            request = request.header("range", format!("bytes={}-", progress.bytes));
            if let Some(validator) = &from.validator {
                request = request.header("if-range", validator);
            }
        }
        let response = request.call().map_err(|error| Stop::Lost(error.to_string()))?;
        let (status, headers) = (response.status(), response.headers().clone());
        let length = header(&headers, "content-length").and_then(|text| text.parse::<u64>().ok());
        match status {
            StatusCode::PARTIAL_CONTENT => {
                let range = header(&headers, "content-range").unwrap_or_default();
                if !range.starts_with(&format!("bytes {}-", progress.bytes)) {
                    return Err(Stop::Refused(format!("{} answers with the range `{range}`", self.url)));
                }
            }
            StatusCode::OK => {
                self.restart(progress).map_err(Stop::Local)?;
                let validator = validator(&headers);
                self.write_from(&From { url: self.url.to_owned(), validator }).map_err(Stop::Local)?;
            }
            // There is no more than we have; whether that is what it should be, the digest says.
            StatusCode::RANGE_NOT_SATISFIABLE if progress.bytes > 0 => return Ok(()),
            status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                return Err(Stop::Lost(format!("the server answers {status}")));
            }
            status => return Err(Stop::Refused(format!("fetch {}: the server answers {status}", self.url))),
        }
        let expected = length.map(|length| progress.bytes + length);
        if let Some(total) = expected {
            let space = Space::for_writing(self.pool, total - progress.bytes);
            if space.needed_bytes > space.free_bytes {
                return Err(Stop::Local(io::ErrorKind::StorageFull.into()));
            }
            self.meter.expect(total);
        }
        let mut body = response.into_body().into_reader();
        let mut buffer = vec![0; BUFFER_BYTES];
        loop {
            let count = match body.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(Stop::Lost(error.to_string())),
            };
            copy::write_all(&self.file, &buffer[..count], progress.bytes)
                .map_err(|errno| Stop::Local(errno.into()))?;
            progress.digest.update(&buffer[..count]);
            progress.bytes += count as u64;
            self.meter.at(progress.bytes);
        }
        match expected {
            Some(total) if progress.bytes < total => Err(Stop::Lost("the connection ended early".to_owned())),
            _ => Ok(()),
        }
    }

    fn read_from(&self) -> From {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let mut text = Vec::new();
        if let Ok(file) = rustix::fs::openat(&self.directory, &self.names[1], flags, Mode::empty()) {
            let _ = File::from(file).take(64 << 10).read_to_end(&mut text);
        }
        // Half-written, or not there: then what has come is of no use.
        serde_json::from_slice(&text).unwrap_or_default()
    }

    fn write_from(&self, from: &From) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, &self.names[1], flags, FILE_MODE)?;
        Ok(copy::write_all(file, &serde_json::to_vec(from)?, 0)?)
    }
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}

/// What says that it is still the same version. A weak ETag doesn't: it is for what means the same.
fn validator(headers: &HeaderMap) -> Option<String> {
    let etag = header(headers, "etag").filter(|etag| !etag.starts_with("W/"));
    etag.or_else(|| header(headers, "last-modified")).map(str::to_owned)
}

fn agent(url: &str) -> ureq::Agent {
    let mut config = ureq::Agent::config_builder()
        .http_status_as_error(false)
        .user_agent(concat!("vmctl/", env!("CARGO_PKG_VERSION")))
        .timeout_connect(Some(CONNECT_TIMEOUT))
        .timeout_recv_response(Some(SILENCE_MAX))
        .timeout_per_read(Some(SILENCE_MAX))
        .tls_config(TlsConfig::builder().root_certs(roots()).build());
    let host = url.parse::<Uri>().ok().and_then(|uri| uri.host().map(str::to_owned)).unwrap_or_default();
    if host == "localhost" || host.starts_with("127.") || host == "[::1]" {
        // A proxy would ask itself.
        config = config.proxy(None);
    }
    config.build().into()
}

fn roots() -> RootCerts {
    for store in TRUST_STORES {
        let Ok(pem) = std::fs::read(store) else { continue };
        let certificates = parse_pem(&pem).filter_map(|item| match item {
            Ok(PemItem::Certificate(certificate)) => Some(certificate),
            _ => None,
        });
        let certificates: Vec<_> = certificates.collect();
        if !certificates.is_empty() {
            return RootCerts::new_with_certs(&certificates);
        }
    }
    RootCerts::WebPki
}
