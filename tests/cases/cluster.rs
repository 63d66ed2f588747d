//! A cluster of one node, set up by the guide for operators, with a kubelet: its guide is right, and a pod has what a pod has.
#![expect(clippy::panic, clippy::unwrap_used, reason = "a panic is how a case fails")]

use hyper_tests::{NODE, Node, documented, given, host, installer_archive, note, wait_for};

const GUIDE: &str = "docs/kubernetes.md";

/// Runs a step of the guide line by line; what it says at the end. Images come from archives here, not from a registry, and the node's
/// init is no systemd.
fn follow(node: &Node, heading: &str) -> String {
    let mut said = String::new();
    for line in documented(GUIDE, heading) {
        if line == "systemctl restart containerd" {
            node.restart_containerd();
        } else if !line.starts_with("ctr image pull ") {
            said = node.shell(&line.replace("NODE", NODE)).ok().text();
        }
    }
    said
}

#[test]
fn guide_for_operators_leads_to_a_pod_with_everything() {
    let prefix = given("HYPER_TEST_PREFIX");
    host(&format!("mkdir /opt/hyper && cp -r {0}/bin {0}/libexec {0}/share /opt/hyper", prefix.display()))
        .ok();
    let node = Node::start();
    follow(&node, "### 1. Put the programs there");
    let block = follow(&node, "### 2. Tell containerd");
    assert!(block.contains("Server:"), "{block}");
    assert!(follow(&node, "### 3. Try it without Kubernetes").ends_with("-hyper"));
    node.join();
    follow(&node, "### 4. The runtime class");
    follow(&node, "### 5. A pod");
    note("docs/kubernetes.md, steps 1 to 5: followed line by line on a node with a kubelet");

    pod_has_everything(&node);

    // What is left is what the guide says it is.
    node.kubectl("delete runtimeclass hyper").ok();
    node.shell("/opt/hyper/bin/hyper install containerd --uninstall").ok();
    node.shell("grep -c hyper /etc/containerd/config.toml").done().says("0");
    node.shell("rm -r /opt/hyper").ok();
}

/// What the runtime has on a node.
fn installed(node: &Node) -> String {
    let places = "/opt/hyper /etc/hyper/containerd.toml /usr/local/bin/containerd-shim-hyper-v2";
    node.shell(&format!("sha256sum /etc/containerd/config.toml; find {places} 2>/dev/null; true")).ok().text()
}

#[test]
fn daemonset_installs_the_runtime_and_it_can_be_taken_out() {
    let node = Node::start();
    let before = installed(&node);
    let archive = installer_archive(node.scratch(), "docker.io/library/hyper-install:1");
    node.shell(&format!("ctr -n k8s.io image import {archive} && rm {archive}")).ok();
    node.join();

    // As the guide has it, but for the tool that edits the tag; this node's init restarts nothing by itself.
    let (base, wish) = (node.scratch().join("base"), node.scratch().join("restart"));
    node.shell(&format!("cp -r deploy/base {base}")).ok();
    let restart = format!("touch {wish}; while [ -e {wish} ]; do sleep 1; done");
    for (file, from, to) in [
        ("kustomization.yaml", "newTag: latest", "newTag: \"1\""),
        ("daemonset.yaml", "value: systemctl restart containerd", &format!("value: {restart:?}")),
    ] {
        let text = std::fs::read_to_string(format!("{base}/{file}")).unwrap();
        assert!(text.contains(from), "{text}");
        node.scratch().file(&format!("base/{file}"), text.replace(from, to));
    }
    node.kubectl(&format!("apply -k {base}")).ok();
    node.kubectl(&format!("label node {NODE} hyper-runtime=true")).ok();
    let mut restarts = 0;
    wait_for("the runtime on the node", || {
        if std::path::Path::new(&wish).exists() {
            node.restart_containerd();
            std::fs::remove_file(&wish).unwrap();
            restarts += 1;
        }
        let status = "-n hyper-system rollout status daemonset hyper-install --timeout=2s";
        node.kubectl(status).done().code_is(0).then_some(())
    });
    assert_eq!(restarts, 1);
    node.kubectl("-n hyper-system logs daemonset/hyper-install").ok().shows("hyper is installed");
    follow(&node, "### 5. A pod");
    overhead_is_what_the_class_says(&node);

    // A second round has nothing to do, and restarts nothing.
    node.kubectl("-n hyper-system delete pod -l app=hyper-install --timeout=100s").ok();
    node.kubectl("-n hyper-system rollout status daemonset hyper-install --timeout=100s").ok();
    assert!(!std::path::Path::new(&wish).exists(), "containerd has all of it");

    for line in documented(GUIDE, "## Take it out") {
        match line.as_str() {
            "systemctl restart containerd" => node.restart_containerd(),
            line => drop(node.shell(&line.replace("deploy/base", &base)).within(300).ok()),
        }
    }
    assert_eq!(installed(&node), before);
    node.kubectl("get runtimeclass,namespace -o name").done().text().lines().for_each(|name| {
        assert!(!name.contains("hyper"), "{name}");
    });
    note(
        "deploy/: image built by its Dockerfile, applied, a pod run, taken out again, on a node with a kubelet",
    );
}

/// Kilobytes (PSS) of a program's processes: what is the guest's memory, and all else. Names of processes are cut off, links are not.
const PSS: &str = "for process in $(pgrep containerd-shim; pgrep hyper-); do \
    [ \"$(basename $(readlink /proc/$process/exe))\" = NAME ] && cat /proc/$process/smaps; done | \
    awk '/^[0-9a-f]+-/ { guest = /memfd:/ } /^Pss:/ { if (guest) of += $2; else own += $2 } END { print of + 0, own + 0 }'";
/// What of a small machine's memory neither its containers nor `MemTotal` have, KiB: the kernel's image and tables.
const KERNEL_KIB: u64 = 24 * 1024;
/// What a machine has beside its containers' limits for what is in it of ours, KiB.
const GUEST_KIB: u64 = 64 * 1024;

/// Measures what a pod takes beside its container, and holds it against the class.
fn overhead_is_what_the_class_says(node: &Node) {
    let manifest = node.scratch().file("idle.yaml", IDLE);
    node.kubectl(&format!("apply -f {manifest}")).ok();
    node.kubectl("wait --for=condition=Ready pod/idle --timeout=150s").ok();
    let kib = |program: &str| {
        let text = host(&PSS.replace("NAME", program)).ok().text();
        let numbers: Vec<u64> = text.split_whitespace().map(|word| word.parse().unwrap()).collect();
        let [guest, own] = numbers.as_slice() else { panic!("{text}") };
        note(&format!(
            "PSS of {program} with one idle pod: {own} KiB, and {guest} KiB of its guest's memory"
        ));
        assert!(*own > 0);
        *own
    };
    let own = kib("hyper-vmm") + kib("hyper-fs");
    // It is not in the pod's control group.
    kib("containerd-shim-hyper-v2");
    let bytes = |text: String| text.parse::<u64>().unwrap() / 1024;
    let used = bytes(node.kubectl("exec idle -- cat /sys/fs/cgroup/memory.current").ok().text());
    // Of the groups that have the pod's id in their names the outermost.
    let group = "find /sys/fs/cgroup -name memory.current -path \"*$(kubectl get pod idle -o jsonpath={.metadata.uid})*\" | \
        awk '{ print length, $0 }' | sort -n | head -n 1 | cut -d ' ' -f 2";
    let counted = bytes(node.shell(&format!("cat $({group})")).ok().text());
    note(&format!("the host counts {counted} KiB for the pod, its guest {used} KiB for the container"));
    let overhead = node.kubectl("get runtimeclass hyper -o jsonpath={.overhead.podFixed.memory}").ok().text();
    let overhead = overhead.trim_end_matches("Mi").parse::<u64>().unwrap() * 1024;
    assert!(own + KERNEL_KIB + GUEST_KIB < overhead, "{own} KiB beside the guest's memory");
    assert!(counted < used + overhead);
    node.kubectl("delete pod idle --timeout=150s").ok();
}

const IDLE: &str = "
apiVersion: v1
kind: Pod
metadata: {name: idle}
spec:
  runtimeClassName: hyper
  terminationGracePeriodSeconds: 1
  containers:
    - {name: idle, image: 'busybox:1.36', command: [sleep, '1000'], resources: {limits: {memory: 64Mi}}}
";

/// Init containers, a sidecar, probes, volumes of each kind, live updates, port-forward, copying, a hook before the end.
fn pod_has_everything(node: &Node) {
    let host_folder = node.scratch().join("host");
    std::fs::create_dir(&host_folder).unwrap();
    let manifest = node.scratch().file("pod.yaml", POD.replace("@HOST", &host_folder));
    node.kubectl(&format!("apply -f {manifest}")).ok();
    node.kubectl("wait --for=condition=Ready pod/whole --timeout=150s").ok();
    let inside = |script: &str| node.kubectl("exec whole -c main -- sh -c \"$@\"").arg("sh").arg(script);
    let reads = |path: &str, text: &str| inside(&format!("cat {path}")).ok().says(text);

    // What the init container and the sidecar left, through the volume of all three.
    reads("/work/out", "prepared");
    reads("/work/sidecar", "sidecar");
    reads("/settings/key", "first");
    reads("/one/key", "first");
    reads("/all/word", "hush");
    inside("cat /all/labels").ok().shows("app=\"whole\"");
    inside("test -s /all/token && echo $NAME $WORD").ok().says("whole hush");
    inside("echo no >/settings/key").fails(1);
    // Memory, as large as was said; folders within a volume are that volume.
    inside("stat -f -c %b,%S /memory").ok().says("2048,4096");
    inside("echo deep >/sub/file; cat /work/inner/file").ok().says("deep");
    inside("uname -r").ok().shows("-hyper");
    // One process namespace for all: the first process is the pod's, and the sidecar is in sight.
    inside("ps").ok().shows("httpd -f -p 127.0.0.1:8080");

    let forward = node.kubectl("port-forward pod/whole 18080:8080").start();
    let text = wait_for("an answer", || {
        let done = host("curl -sf --max-time 20 http://127.0.0.1:18080/out").done();
        done.code_is(0).then(|| done.text())
    });
    assert_eq!(text, "prepared");
    forward.signal("INT");
    drop(forward.done());

    let file = node.scratch().file("copied", "to the pod\n");
    node.kubectl(&format!("cp {file} whole:/work/copied -c main")).ok();
    reads("/work/copied", "to the pod");

    // A change reaches the volume while the pod runs; a file of its own keeps what it was.
    let change =
        "create configmap settings --from-literal=key=second --dry-run=client -o yaml | kubectl apply -f -";
    node.kubectl(change).ok();
    wait_for("the change", || (inside("cat /settings/key").done().text() == "second").then_some(()));
    reads("/one/key", "first");

    node.kubectl("delete pod whole --timeout=150s").ok();
    let hook = std::fs::read_to_string(format!("{host_folder}/stopped")).unwrap();
    assert_eq!(hook, "the hook has run\n");
    wait_for("no virtual machine", || {
        host("! pgrep -x 'hyper-vmm|hyper-fs|containerd-shim'").done().code_is(0).then_some(())
    });
}

const POD: &str = r#"
apiVersion: v1
kind: ConfigMap
metadata: {name: settings}
data: {key: first}
---
apiVersion: v1
kind: Secret
metadata: {name: password}
stringData: {word: hush}
---
apiVersion: v1
kind: Pod
metadata:
  name: whole
  labels: {app: whole}
spec:
  runtimeClassName: hyper
  shareProcessNamespace: true
  terminationGracePeriodSeconds: 60
  initContainers:
    - name: prepare
      image: busybox:1.36
      command: [sh, -c, echo prepared >/work/out]
      volumeMounts: [{name: work, mountPath: /work}]
    - name: sidecar
      image: busybox:1.36
      restartPolicy: Always
      command: [sh, -c, echo sidecar >/work/sidecar; exec httpd -f -p 127.0.0.1:8080 -h /work]
      volumeMounts: [{name: work, mountPath: /work}]
  containers:
    - name: main
      image: busybox:1.36
      command: [sh, -c, "trap 'exit 0' TERM; while true; do sleep 1; done"]
      env:
        - {name: NAME, valueFrom: {fieldRef: {fieldPath: metadata.name}}}
        - {name: WORD, valueFrom: {secretKeyRef: {name: password, key: word}}}
      readinessProbe: {exec: {command: [test, -e, /work/sidecar]}, periodSeconds: 2, timeoutSeconds: 20}
      livenessProbe: {exec: {command: ["true"]}, periodSeconds: 20, timeoutSeconds: 20}
      lifecycle: {preStop: {exec: {command: [sh, -c, echo the hook has run >/host/stopped]}}}
      resources: {limits: {memory: 64Mi}, requests: {cpu: 50m}}
      volumeMounts:
        - {name: work, mountPath: /work}
        - {name: work, mountPath: /sub, subPath: inner}
        - {name: memory, mountPath: /memory}
        - {name: settings, mountPath: /settings, readOnly: true}
        - {name: settings, mountPath: /one/key, subPath: key}
        - {name: all, mountPath: /all}
        - {name: host, mountPath: /host}
  volumes:
    - {name: work, emptyDir: {sizeLimit: 10Mi}}
    - {name: memory, emptyDir: {medium: Memory, sizeLimit: 8Mi}}
    - {name: settings, configMap: {name: settings}}
    - {name: host, hostPath: {path: "@HOST", type: Directory}}
    - name: all
      projected:
        sources:
          - secret: {name: password}
          - configMap: {name: settings}
          - downwardAPI: {items: [{path: labels, fieldRef: {fieldPath: metadata.labels}}]}
          - serviceAccountToken: {path: token}
"#;
