//! A node of a Kubernetes cluster: Debian's containerd as its package sets it up, a kubelet, and the control plane beside it.
//!
//! It takes the host's own places (`/etc/containerd`, `/var/lib/containerd`), so it is for a machine that is thrown away.
#![expect(clippy::panic, reason = "assertions of the cases; a panic is how a case fails")]

use std::cell::RefCell;
use std::collections::HashMap;

use crate::containerd::{image_name, show_log};
use crate::program::{Run, Running, host};
use crate::{Scratch, fixtures, given, wait_for};

/// Name of the node.
pub const NODE: &str = "node-of-this-case";
/// What a kubelet asks containerd 1.6 for when a pod begins.
const PAUSE: &str = "registry.k8s.io/pause:3.6";
/// Its address; a route leads nowhere, but the API server wants one.
const ADDRESS: &str = "192.0.2.1";
/// Where the API server listens.
const API: &str = "https://127.0.0.1:6443";
/// Last lines of each part's log in a failure.
const PARTS: [&str; 6] =
    ["containerd", "etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet"];

/// A node with containerd; a cluster from [`Node::join`] on.
#[derive(Debug)]
pub struct Node {
    scratch: Scratch,
    parts: RefCell<HashMap<&'static str, Running>>,
}

impl Node {
    /// Starts containerd as Debian's package configures it, with images that a cluster would pull.
    #[must_use]
    pub fn start() -> Self {
        let node = Self { scratch: Scratch::new(), parts: RefCell::default() };
        // Layers cannot lie on the overlay that this machine's root is.
        let store = node.scratch.join("store");
        host(&format!(
            "mkdir -p {store} /var/lib/containerd /etc/cni/net.d && mount --bind {store} /var/lib/containerd"
        ))
        .ok();
        if let Err(error) = std::fs::write("/etc/cni/net.d/10-case.conflist", crate::containerd::CNI_CONF) {
            panic!("writing CNI's configuration: {error}");
        }
        node.restart_containerd();
        for (name, wanted) in [("busybox", "docker.io/library/busybox:1.36"), ("pause", PAUSE)] {
            let archive = fixtures().join(format!("archives/{name}.tar"));
            let script = format!(
                "for n in default k8s.io; do ctr -n $n image import --base-name docker.io/library/{name} {} && \
                 ctr -n $n image tag {} {wanted} || exit 1; done",
                archive.display(),
                image_name(name),
            );
            host(&script).ok();
        }
        node
    }

    /// What an operator's `systemctl restart containerd` does.
    pub fn restart_containerd(&self) {
        let before = self.parts.borrow_mut().remove("containerd");
        if let Some(daemon) = before {
            daemon.signal("TERM");
            drop(daemon.done());
        }
        // systemd's units find programs in these places.
        self.spawn(
            "containerd",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin containerd",
        );
        wait_for("containerd", || host("ctr version").done().code_is(0).then_some(()));
    }

    fn spawn(&self, part: &'static str, script: &str) {
        let log = self.scratch.join(part);
        let running = host(&format!("cd {}; exec >>{log}.log 2>&1; {script}", self.scratch.path().display()));
        self.parts.borrow_mut().insert(part, running.within(3600).start());
    }

    /// Starts the control plane and the kubelet; comes back when the node is ready.
    pub fn join(&self) {
        let path = self.scratch.path().display();
        let programs = given("HYPER_TEST_CLUSTER").join("bin/cluster");
        host(&format!(
            "cd {path} && mkdir bin && for n in etcd kube-apiserver kube-controller-manager kube-scheduler kubelet kubectl; do \
             ln -s {} bin/$n; done; openssl genrsa -out key 2048 && echo 'secret,admin,1,\"system:masters\"' >tokens && \
             ip link add node0 type bridge && ip addr add {ADDRESS}/24 dev node0 && ip link set node0 up && \
             ip route add default via 192.0.2.2 dev node0",
            programs.display()
        ))
        .ok();
        self.scratch.file("kubeconfig", KUBECONFIG.replace("@API", API));
        self.scratch.file("kubelet.yaml", KUBELET);
        self.spawn(
            "etcd",
            "exec bin/etcd --data-dir etcd-data --unsafe-no-fsync --listen-client-urls http://127.0.0.1:2379 \
             --advertise-client-urls http://127.0.0.1:2379",
        );
        self.spawn(
            "kube-apiserver",
            &format!(
                "exec bin/kube-apiserver --etcd-servers http://127.0.0.1:2379 --cert-dir certificates --service-account-key-file key \
                 --service-account-signing-key-file key --service-account-issuer https://kubernetes.default.svc \
                 --token-auth-file tokens --service-cluster-ip-range 10.96.0.0/16 --bind-address 127.0.0.1 \
                 --advertise-address {ADDRESS} --allow-privileged --kubelet-preferred-address-types InternalIP"
            ),
        );
        let ready = format!("curl -skf -H 'Authorization: Bearer secret' {API}");
        wait_for("the API server", || host(&format!("{ready}/readyz")).done().code_is(0).then_some(()));
        self.spawn(
            "kube-controller-manager",
            "exec bin/kube-controller-manager --kubeconfig kubeconfig --leader-elect=false \
             --service-account-private-key-file key --root-ca-file certificates/apiserver.crt",
        );
        self.spawn("kube-scheduler", "exec bin/kube-scheduler --kubeconfig kubeconfig --leader-elect=false");
        self.spawn(
            "kubelet",
            &format!(
                "exec bin/kubelet --kubeconfig kubeconfig --config kubelet.yaml --root-dir $PWD/kubelet --cert-dir $PWD/kubelet-certificates \
                 --hostname-override {NODE} --node-ip {ADDRESS}"
            ),
        );
        wait_for("the node to be ready", || {
            let answer = host(&format!("{ready}/api/v1/nodes/{NODE}")).done().text();
            answer.contains("kubelet is posting ready status").then_some(())
        });
    }

    /// A line of an operator's at a shell in the clone, with `kubectl` and `ctr` at hand.
    #[must_use]
    pub fn shell(&self, line: &str) -> Run {
        let path = self.scratch.path().display();
        host(&format!(
            "export KUBECONFIG={path}/kubeconfig PATH={path}/bin:$PATH:/usr/sbin:/sbin; cd {}; {line}",
            concat!(env!("CARGO_MANIFEST_DIR"), "/..")
        ))
    }

    /// `kubectl`, with words as a shell takes them.
    #[must_use]
    pub fn kubectl(&self, words: &str) -> Run {
        self.shell(&format!("kubectl {words}"))
    }

    /// Where its files are.
    #[must_use]
    pub fn scratch(&self) -> &Scratch {
        &self.scratch
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            PARTS.iter().for_each(|part| show_log(&self.scratch.join(&format!("{part}.log"))));
        }
        let mut parts = self.parts.borrow_mut();
        // The kubelet first: it would mend what the others leave.
        for part in PARTS.iter().rev() {
            if let Some(running) = parts.remove(part) {
                running.signal("TERM");
                drop(running.done());
            }
        }
        // The next case has a node of its own.
        drop(
            host("export PATH=$PATH:/sbin:/usr/sbin; ip link del node0; umount -l /var/lib/containerd")
                .done(),
        );
    }
}

/// Lines of the shell blocks between a heading of a document in the clone and the next heading; what is behind ` #` is left out.
///
/// # Panics
/// When there is no such document or heading, or nothing is to be run there.
#[must_use]
pub fn documented(document: &str, heading: &str) -> Vec<String> {
    let path = format!("{}/../{document}", env!("CARGO_MANIFEST_DIR"));
    let text = match std::fs::read_to_string(&path) {
        Ok(text) => text,
        Err(error) => panic!("reading {path}: {error}"),
    };
    let section = text.split_once(&format!("{heading}\n")).map_or("", |(_, rest)| rest);
    let section = section.split("\n##").next().unwrap_or_default();
    let blocks = section.split("```sh\n").skip(1).filter_map(|rest| rest.split("```").next());
    let lines = blocks.flat_map(str::lines).map(|line| line.split(" #").next().unwrap_or_default().trim());
    let lines: Vec<_> = lines.filter(|line| !line.is_empty()).map(str::to_owned).collect();
    assert!(!lines.is_empty(), "{document} has no shell block below {heading:?}");
    lines
}

const KUBECONFIG: &str = r#"apiVersion: v1
kind: Config
clusters: [{name: case, cluster: {server: "@API", insecure-skip-tls-verify: true}}]
users: [{name: admin, user: {token: secret}}]
contexts: [{name: case, context: {cluster: case, user: admin}}]
current-context: case
"#;

/// Whoever reaches this machine may ask its kubelet; nothing is evicted for want of what a test machine lacks; volumes are looked at often.
const KUBELET: &str = r#"apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication: {anonymous: {enabled: true}, webhook: {enabled: false}}
authorization: {mode: AlwaysAllow}
cgroupDriver: cgroupfs
failSwapOn: false
containerRuntimeEndpoint: unix:///run/containerd/containerd.sock
resolvConf: ""
syncFrequency: 5s
evictionHard: {memory.available: 1Mi, nodefs.available: "0%", imagefs.available: "0%"}
"#;
