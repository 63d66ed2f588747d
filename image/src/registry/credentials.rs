//! Credentials for registries: given by the caller, or from Docker's `config.json` and credential helpers.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::error::{ImageError, Result, blocking, clean};
use crate::reference::Reference;
use crate::store::read_bounded;

/// Docker's name for its own registry in configurations and helpers.
const HUB_KEY: &str = "https://index.docker.io/v1/";
/// Largest `config.json`.
const MAX_DOCKER_CONFIG: u64 = 1 << 20;
/// Largest answer of a helper.
const MAX_HELPER_OUTPUT: u64 = 64 << 10;
/// Longest that a helper may take; some ask a keychain that asks a person.
const HELPER_PATIENCE: Duration = Duration::from_secs(30);

/// Whose credentials a pull uses.
#[derive(Clone, Default, PartialEq, Eq)]
pub enum Auth {
    /// What `docker login` stored: `$DOCKER_CONFIG/config.json`, else `~/.docker/config.json`.
    #[default]
    DockerConfig,
    /// None.
    Anonymous,
    /// These.
    Basic {
        /// User name.
        username: String,
        /// Password or access token.
        password: String,
    },
}

impl fmt::Debug for Auth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::DockerConfig => f.write_str("DockerConfig"),
            Self::Anonymous => f.write_str("Anonymous"),
            Self::Basic { username, .. } => write!(f, "Basic({username}, ...)"),
        }
    }
}

/// What there is to prove who we are. No `Debug`: it holds secrets.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum Credentials {
    /// Nothing.
    Anonymous,
    /// User and password.
    Basic { username: String, password: String },
    /// An OAuth2 refresh token.
    Identity(String),
    /// A bearer token as it is.
    Registry(String),
}

/// Where credentials are looked for.
#[derive(Clone, Debug, Default)]
pub(crate) struct Source {
    pub(crate) auth: Auth,
    /// Directory of `config.json`; `None` means as the environment says.
    pub(crate) config_dir: Option<PathBuf>,
    /// Directory of helper programs; `None` means `PATH`.
    pub(crate) helper_dir: Option<PathBuf>,
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DockerConfig {
    auths: Option<BTreeMap<String, AuthEntry>>,
    cred_helpers: Option<BTreeMap<String, String>>,
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct AuthEntry {
    auth: Option<String>,
    username: Option<String>,
    password: Option<String>,
    identitytoken: Option<String>,
    registrytoken: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct HelperAnswer {
    username: String,
    secret: String,
}

impl Source {
    /// Finds the credentials for a reference's registry.
    pub(crate) async fn credentials(&self, reference: &Reference) -> Result<Credentials> {
        match &self.auth {
            Auth::Anonymous => Ok(Credentials::Anonymous),
            Auth::Basic { username, password } => {
                Ok(Credentials::Basic { username: username.clone(), password: password.clone() })
            }
            Auth::DockerConfig => self.stored_by_docker(reference.domain()).await,
        }
    }

    /// Finds them where `docker login` puts them: helper of the registry, general helper, the file itself.
    async fn stored_by_docker(&self, domain: &str) -> Result<Credentials> {
        let Some(path) = self.config_path() else { return Ok(Credentials::Anonymous) };
        let (file, host) = (path.clone(), domain.to_owned());
        let Some(config) = blocking(move || load(&file, &host)).await? else {
            return Ok(Credentials::Anonymous);
        };
        let key = if domain == "docker.io" { HUB_KEY } else { domain };
        let special = config.cred_helpers.iter().flatten().find(|(name, _)| is_same_registry(name, domain));
        if let Some(helper) = special.map(|(_, helper)| helper).or(config.creds_store.as_ref())
            && !helper.is_empty()
        {
            match self.ask_helper(helper, key).await {
                Ok(Some(found)) => return Ok(found),
                Ok(None) => {}
                // A public image needs no credentials, so a broken helper is no reason to fail by itself.
                Err(why) => tracing::warn!(helper, registry = domain, why, "credential helper failed"),
            }
        }
        let entry = config.auths.iter().flatten().find(|(name, _)| is_same_registry(name, domain));
        let Some((_, entry)) = entry else { return Ok(Credentials::Anonymous) };
        decode(entry).map_err(|why| ImageError::Credentials {
            host: domain.to_owned(),
            from: path.display().to_string(),
            why: why.to_owned(),
        })
    }

    fn config_path(&self) -> Option<PathBuf> {
        let from_environment = || {
            let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
            match set("DOCKER_CONFIG") {
                Some(dir) => Some(PathBuf::from(dir)),
                None => Some(PathBuf::from(set("HOME")?).join(".docker")),
            }
        };
        Some(self.config_dir.clone().or_else(from_environment)?.join("config.json"))
    }

    /// Runs `docker-credential-<helper> get`. `None` if it knows nothing of the registry.
    async fn ask_helper(&self, helper: &str, key: &str) -> std::result::Result<Option<Credentials>, String> {
        let valid = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if helper.len() > 64 || !helper.bytes().all(valid) {
            return Err("its name is malformed".to_owned());
        }
        let name = format!("docker-credential-{helper}");
        let program: OsString = match &self.helper_dir {
            Some(dir) => dir.join(&name).into(),
            None => name.into(),
        };
        let run = async {
            let mut child = tokio::process::Command::new(&program)
                .arg("get")
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .stderr(Stdio::null())
                .kill_on_drop(true)
                .spawn()?;
            if let Some(mut stdin) = child.stdin.take() {
                // A helper that does not read its input still gives an answer worth reading.
                let _ = stdin.write_all(key.as_bytes()).await;
            }
            let mut output = Vec::new();
            if let Some(stdout) = child.stdout.take() {
                stdout.take(MAX_HELPER_OUTPUT).read_to_end(&mut output).await?;
            }
            Ok::<_, std::io::Error>((child.wait().await?, output))
        };
        let (status, output) = match tokio::time::timeout(HELPER_PATIENCE, run).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(error)) => return Err(error.to_string()),
            Err(_) => return Err(format!("it gave no answer for {} s", HELPER_PATIENCE.as_secs())),
        };
        if !status.success() {
            let text = clean(String::from_utf8_lossy(&output).trim());
            let unknown = text.contains("credentials not found");
            return if unknown { Ok(None) } else { Err(format!("{status}: {text}")) };
        }
        let answer: HelperAnswer = serde_json::from_slice(&output)
            .map_err(|_| "its answer is no JSON with Username and Secret".to_owned())?;
        Ok(match answer.username.as_str() {
            "" => None,
            "<token>" => Some(Credentials::Identity(answer.secret)),
            _ => Some(Credentials::Basic { username: answer.username, password: answer.secret }),
        })
    }
}

/// Reads `config.json`; `None` if there is none.
fn load(path: &Path, host: &str) -> Result<Option<DockerConfig>> {
    let Some(bytes) = read_bounded(path, MAX_DOCKER_CONFIG)? else { return Ok(None) };
    match serde_json::from_slice(&bytes) {
        Ok(config) => Ok(Some(config)),
        // The parser's words would quote the file, and the file holds secrets.
        Err(error) => Err(ImageError::Credentials {
            host: host.to_owned(),
            from: path.display().to_string(),
            why: format!("line {} column {} is not what it should be", error.line(), error.column()),
        }),
    }
}

/// Whether a key of the configuration means the registry `domain`; keys may be URLs.
fn is_same_registry(key: &str, domain: &str) -> bool {
    let key = key.strip_prefix("https://").or_else(|| key.strip_prefix("http://")).unwrap_or(key);
    let host = key.split('/').next().unwrap_or(key);
    let hub = |host: &str| matches!(host, "docker.io" | "index.docker.io" | "registry-1.docker.io");
    host == domain || (hub(host) && hub(domain))
}

/// Decodes one entry of `auths`.
fn decode(entry: &AuthEntry) -> std::result::Result<Credentials, &'static str> {
    let given = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    if let Some(token) = given(&entry.identitytoken) {
        return Ok(Credentials::Identity(token));
    }
    if let Some(token) = given(&entry.registrytoken) {
        return Ok(Credentials::Registry(token));
    }
    if let Some(auth) = given(&entry.auth) {
        let bytes = STANDARD.decode(auth.trim()).map_err(|_| "its auth field is not base64")?;
        let text = String::from_utf8(bytes).map_err(|_| "its auth field is not text")?;
        let (username, password) = text.split_once(':').ok_or("its auth field lacks a colon")?;
        let password = password.trim_end_matches('\0').to_owned();
        return Ok(Credentials::Basic { username: username.to_owned(), password });
    }
    match (given(&entry.username), given(&entry.password)) {
        (Some(username), Some(password)) => Ok(Credentials::Basic { username, password }),
        _ => Ok(Credentials::Anonymous),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(config: &str) -> (tempfile::TempDir, Source) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), config).unwrap();
        let path = Some(dir.path().to_owned());
        let source = Source { auth: Auth::DockerConfig, config_dir: path.clone(), helper_dir: path };
        (dir, source)
    }

    /// Lets a child write the script: a descriptor open for writing here could be inherited by another test's child
    /// and make the script "busy".
    fn helper(dir: &Path, name: &str, body: &str) {
        let path = dir.join(format!("docker-credential-{name}"));
        let status = std::process::Command::new("sh")
            .args(["-c", r#"printf '#!/bin/sh\n%s\n' "$2" > "$1" && chmod 755 "$1""#, "sh"])
            .arg(&path)
            .arg(body)
            .status()
            .unwrap();
        assert!(status.success());
    }

    async fn found(source: &Source, image: &str) -> Credentials {
        source.credentials(&Reference::parse(image).unwrap()).await.unwrap()
    }

    fn basic(username: &str, password: &str) -> Credentials {
        Credentials::Basic { username: username.into(), password: password.into() }
    }

    #[tokio::test]
    async fn the_file_itself() {
        let (_dir, source) = source(
            r#"{"auths":{"https://index.docker.io/v1/":{"auth":"dTpwOnE="},"r.example:5000":{"username":"a","password":"b"},
            "https://t.example/v2/":{"identitytoken":"tok"},"e.example":{}},"HttpHeaders":{"x":"y"}}"#,
        );
        assert!(found(&source, "nginx").await == basic("u", "p:q"));
        assert!(found(&source, "r.example:5000/x").await == basic("a", "b"));
        assert!(found(&source, "r.example/x").await == Credentials::Anonymous);
        assert!(found(&source, "t.example/x").await == Credentials::Identity("tok".into()));
        assert!(found(&source, "e.example/x").await == Credentials::Anonymous);
    }

    #[tokio::test]
    async fn helpers_come_first_and_may_fail() {
        let (dir, source) = source(
            r#"{"credsStore":"general","credHelpers":{"special.example":"special","gone.example":"gone"},
            "auths":{"gone.example":{"username":"a","password":"b"},"none.example":{"username":"c","password":"d"}}}"#,
        );
        helper(dir.path(), "special", r#"read host; echo "{\"Username\":\"$1\",\"Secret\":\"$host\"}""#);
        helper(
            dir.path(),
            "general",
            r#"read host; case $host in t.*) echo '{"Username":"<token>","Secret":"s"}';; *) echo "credentials not found in native keychain"; exit 1;; esac"#,
        );
        assert!(found(&source, "special.example/x").await == basic("get", "special.example"));
        assert!(found(&source, "t.example/x").await == Credentials::Identity("s".into()));
        assert!(found(&source, "none.example/x").await == basic("c", "d"));
        assert!(found(&source, "gone.example/x").await == basic("a", "b"));
        assert!(found(&source, "nginx").await == Credentials::Anonymous);
    }

    #[tokio::test]
    async fn hostile_names_and_files_are_refused() {
        let (_dir, odd) = source(r#"{"credsStore":"../../bin/sh"}"#);
        assert!(odd.ask_helper("../../bin/sh", "x").await.is_err());
        assert!(found(&odd, "nginx").await == Credentials::Anonymous);
        let (_dir, broken) = source(r#"{"auths":{"docker.io":{"auth":"c2VjcmV0"#);
        let error = broken.credentials(&Reference::parse("nginx").unwrap()).await.err().unwrap().one_line();
        assert!(error.contains("config.json") && !error.contains("c2Vj"), "{error}");
        let (_dir, bad) = source(r#"{"auths":{"docker.io":{"auth":"!!"}}}"#);
        assert!(bad.credentials(&Reference::parse("nginx").unwrap()).await.is_err());
    }

    #[test]
    fn secrets_are_not_printed() {
        let auth = Auth::Basic { username: "u".into(), password: "hush".into() };
        assert!(!format!("{auth:?}").contains("hush"));
    }
}
