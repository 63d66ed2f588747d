//! A server on a Unix socket of the host.
#![expect(clippy::panic, reason = "assertions of the cases; a panic is how a case fails")]

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;

/// Answers every HTTP request on a socket with a text, as long as the case runs.
///
/// # Panics
/// When nobody can listen there.
pub fn answers_on(path: &str, text: &'static str) {
    let listener = match UnixListener::bind(path) {
        Ok(listener) => listener,
        Err(error) => panic!("listening on {path}: {error}"),
    };
    std::thread::spawn(move || {
        for client in listener.incoming().flatten() {
            let mut client = client;
            // A client that breaks off has no answer.
            let mut request = [0; 4096];
            if matches!(client.read(&mut request), Ok(length) if length > 0) {
                let answer = format!("HTTP/1.0 200 OK\r\nContent-Length: {}\r\n\r\n{text}", text.len());
                drop(client.write_all(answer.as_bytes()));
            }
        }
    });
}
