//! The way out: forwarding, and an nftables table of our own with address translation.
//!
//! Nobody else's rules are touched. Connections from elsewhere to containers are dropped: the way in is a published port.

use std::path::Path;
use std::process::Stdio;

use tokio::io::AsyncWriteExt;

use super::NetworkError;
use super::subnet::Subnet;
use crate::launch::scaled_ms;

/// How long `nft` may take.
const NFT_MS: u64 = 10_000;
/// Longest output of `nft` that is kept, bytes.
const MAX_OUTPUT_BYTES: usize = 64 * 1024;
const FORWARD: &str = "/proc/sys/net/ipv4/ip_forward";

/// Name of our table for a bridge.
fn table(bridge: &str) -> String {
    if bridge == super::DEFAULT_BRIDGE { "hyper".to_owned() } else { format!("hyper_{bridge}") }
}

/// What makes the table anew; one transaction.
fn script(bridge: &str, subnet: Subnet) -> String {
    let table = table(bridge);
    format!(
        "add table inet {table}\n\
         flush table inet {table}\n\
         table inet {table} {{\n\
         \tchain postrouting {{\n\
         \t\ttype nat hook postrouting priority srcnat; policy accept;\n\
         \t\tip saddr {subnet} oifname != \"{bridge}\" masquerade\n\
         \t}}\n\
         \tchain forward {{\n\
         \t\ttype filter hook forward priority filter; policy accept;\n\
         \t\toifname \"{bridge}\" iifname != \"{bridge}\" ct state established,related accept\n\
         \t\toifname \"{bridge}\" iifname != \"{bridge}\" drop\n\
         \t}}\n\
         }}\n"
    )
}

/// Turns forwarding on and makes our table, if they are not there.
pub(crate) async fn ensure(bridge: &str, subnet: Subnet) -> Result<(), NetworkError> {
    enable_forwarding(Path::new(FORWARD))?;
    if let Ok(rules) = nft(&["list", "table", "inet", &table(bridge)], "").await
        && rules.contains(&format!("ip saddr {subnet} oifname != \"{bridge}\" masquerade"))
    {
        return Ok(());
    }
    nft(&["-f", "-"], &script(bridge, subnet)).await.map(|_| ())
}

fn enable_forwarding(path: &Path) -> Result<(), NetworkError> {
    let on = std::fs::read_to_string(path).is_ok_and(|value| value.trim() == "1");
    if on {
        return Ok(());
    }
    std::fs::write(path, "1").map_err(|source| NetworkError::Forwarding { path: path.to_owned(), source })
}

/// Runs `nft` and returns what it printed.
async fn nft(args: &[&str], input: &str) -> Result<String, NetworkError> {
    let var = std::env::var_os("PATH").unwrap_or_default().to_string_lossy().into_owned();
    let mut command = tokio::process::Command::new("nft");
    command
        .args(args)
        .env("PATH", format!("{var}:/usr/sbin:/sbin"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let failed = |message: String| NetworkError::Nft { command: args.join(" "), message };
    let mut child = match command.spawn() {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Err(NetworkError::NoNft),
        child => child.map_err(|error| failed(error.to_string()))?,
    };
    let run = async {
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes()).await?;
        }
        child.wait_with_output().await
    };
    let output = tokio::time::timeout(scaled_ms(NFT_MS), run).await;
    let output =
        output.map_err(|_| failed("it takes too long".into()))?.map_err(|error| failed(error.to_string()))?;
    let text =
        |bytes: &[u8]| String::from_utf8_lossy(bytes.get(..MAX_OUTPUT_BYTES).unwrap_or(bytes)).into_owned();
    if output.status.success() {
        return Ok(text(&output.stdout));
    }
    let stderr = text(&output.stderr);
    Err(failed(stderr.lines().next().map_or_else(|| output.status.to_string(), str::to_owned)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn script_names_bridge_and_subnet() {
        let text = script("hyper0", "10.120.0.0/16".parse().unwrap());
        assert!(text.contains("table inet hyper {"));
        assert!(text.contains("ip saddr 10.120.0.0/16 oifname != \"hyper0\" masquerade"));
        assert!(script("br7", "10.1.0.0/24".parse().unwrap()).contains("table inet hyper_br7 {"));
    }

    #[test]
    fn forwarding_is_turned_on_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ip_forward");
        std::fs::write(&path, "0\n").unwrap();
        enable_forwarding(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1");
        std::fs::write(&path, "1\n").unwrap();
        enable_forwarding(&path).unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n", "left alone");
        assert!(enable_forwarding(&dir.path().join("no/such")).is_err());
    }
}
