// Command cri is a client of the Container Runtime Interface, such as a kubelet is: what the cases ask containerd for.
//
//	cri SOCKET VERB [ARGUMENT...]
//
// Configurations are files with the JSON form of the interface's messages. Streams are those of this program.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/portforward"
	"k8s.io/client-go/tools/remotecommand"
	"k8s.io/client-go/transport/spdy"
	"k8s.io/client-go/util/exec"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// limit is how long one call may take: the slowest machines boot for minutes.
const limit = 5 * time.Minute

// execSeconds is how long a command of execsync may run.
const execSeconds = 240

type client struct {
	runtime cri.RuntimeServiceClient
	ctx     context.Context
}

// verb is one thing to ask for: its arguments as they are shown, and what it does.
type verb struct {
	usage string
	do    func(*client, []string) error
}

var verbs = map[string]verb{
	"version":      {"", (*client).version},
	"run-pod":      {"HANDLER POD.json", (*client).runPod},
	"create":       {"POD-ID POD.json CONTAINER.json", (*client).create},
	"start":        {"CONTAINER-ID", (*client).start},
	"exec-sync":    {"CONTAINER-ID PROGRAM [ARGUMENT...]", (*client).execSync},
	"exec":         {"CONTAINER-ID PROGRAM [ARGUMENT...]", (*client).exec},
	"exec-tty":     {"CONTAINER-ID PROGRAM [ARGUMENT...]", (*client).execTty},
	"attach":       {"CONTAINER-ID", (*client).attach},
	"port-forward": {"POD-ID LOCAL:REMOTE", (*client).portForward},
	"status":       {"CONTAINER-ID", (*client).status},
	"pod-status":   {"POD-ID", (*client).podStatus},
	"stats":        {"CONTAINER-ID", (*client).stats},
	"pod-stats":    {"POD-ID", (*client).podStats},
	"update":       {"CONTAINER-ID RESOURCES.json", (*client).update},
	"stop":         {"CONTAINER-ID SECONDS", (*client).stop},
	"remove":       {"CONTAINER-ID", (*client).remove},
	"stop-pod":     {"POD-ID", (*client).stopPod},
	"remove-pod":   {"POD-ID", (*client).removePod},
	"pods":         {"", (*client).pods},
	"containers":   {"", (*client).containers},
	"reopen-log":   {"CONTAINER-ID", (*client).reopenLog},
}

func main() {
	if err := run(os.Args[1:]); err != nil {
		var exit exec.CodeExitError
		if errors.As(err, &exit) {
			os.Exit(exit.Code)
		}
		fmt.Fprintf(os.Stderr, "cri: %v\n", err)
		os.Exit(125)
	}
}

func run(args []string) error {
	if len(args) < 2 {
		return errors.New("usage: cri SOCKET VERB [ARGUMENT...]")
	}
	verb, ok := verbs[args[1]]
	if !ok {
		return fmt.Errorf("unknown verb %q", args[1])
	}
	if least := len(strings.Fields(strings.Split(verb.usage, "[")[0])); len(args)-2 < least {
		return fmt.Errorf("usage: cri SOCKET %s %s", args[1], verb.usage)
	}
	conn, err := grpc.NewClient("unix://"+args[0], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	defer cancel()
	return verb.do(&client{runtime: cri.NewRuntimeServiceClient(conn), ctx: ctx}, args[2:])
}

func read(path string, into proto.Message) error {
	text, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := protojson.Unmarshal(text, into); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

// show prints a message as JSON on one line.
func show(message proto.Message) error {
	text, err := protojson.Marshal(message)
	if err == nil {
		_, err = fmt.Printf("%s\n", text)
	}
	return err
}

// line prints the text that an answer has, unless there was none.
func line(text string, err error) error {
	if err == nil {
		_, err = fmt.Println(text)
	}
	return err
}

func (c *client) version([]string) error {
	answer, err := c.runtime.Version(c.ctx, &cri.VersionRequest{})
	return line(answer.GetRuntimeVersion(), err)
}

func (c *client) runPod(args []string) error {
	config := &cri.PodSandboxConfig{}
	if err := read(args[1], config); err != nil {
		return err
	}
	answer, err := c.runtime.RunPodSandbox(c.ctx, &cri.RunPodSandboxRequest{Config: config, RuntimeHandler: args[0]})
	return line(answer.GetPodSandboxId(), err)
}

func (c *client) create(args []string) error {
	pod, container := &cri.PodSandboxConfig{}, &cri.ContainerConfig{}
	if err := errors.Join(read(args[1], pod), read(args[2], container)); err != nil {
		return err
	}
	request := &cri.CreateContainerRequest{PodSandboxId: args[0], Config: container, SandboxConfig: pod}
	answer, err := c.runtime.CreateContainer(c.ctx, request)
	return line(answer.GetContainerId(), err)
}

func (c *client) start(args []string) error {
	_, err := c.runtime.StartContainer(c.ctx, &cri.StartContainerRequest{ContainerId: args[0]})
	return err
}

func (c *client) execSync(args []string) error {
	request := &cri.ExecSyncRequest{ContainerId: args[0], Cmd: args[1:], Timeout: execSeconds}
	answer, err := c.runtime.ExecSync(c.ctx, request)
	if err != nil {
		return err
	}
	os.Stdout.Write(answer.GetStdout())
	os.Stderr.Write(answer.GetStderr())
	if code := answer.GetExitCode(); code != 0 {
		return exec.CodeExitError{Err: errors.New("the command failed"), Code: int(code)}
	}
	return nil
}

// stream connects the streams of this program with those that containerd serves at an address.
func (c *client) stream(address string, tty bool) error {
	parsed, err := url.Parse(address)
	if err != nil {
		return err
	}
	executor, err := remotecommand.NewSPDYExecutor(&rest.Config{}, http.MethodPost, parsed)
	if err != nil {
		return err
	}
	options := remotecommand.StreamOptions{Stdin: os.Stdin, Stdout: os.Stdout, Tty: tty}
	if !tty {
		options.Stderr = os.Stderr
	}
	return executor.StreamWithContext(c.ctx, options)
}

func (c *client) exec(args []string) error    { return c.execStream(args, false) }
func (c *client) execTty(args []string) error { return c.execStream(args, true) }

func (c *client) execStream(args []string, tty bool) error {
	request := &cri.ExecRequest{ContainerId: args[0], Cmd: args[1:], Stdin: true, Stdout: true, Stderr: !tty, Tty: tty}
	answer, err := c.runtime.Exec(c.ctx, request)
	if err != nil {
		return err
	}
	return c.stream(answer.GetUrl(), tty)
}

func (c *client) attach(args []string) error {
	request := &cri.AttachRequest{ContainerId: args[0], Stdin: true, Stdout: true, Stderr: true}
	answer, err := c.runtime.Attach(c.ctx, request)
	if err != nil {
		return err
	}
	return c.stream(answer.GetUrl(), false)
}

// portForward says "ready" once the local port listens, and forwards until it is told to end.
func (c *client) portForward(args []string) error {
	answer, err := c.runtime.PortForward(c.ctx, &cri.PortForwardRequest{PodSandboxId: args[0]})
	if err != nil {
		return err
	}
	address, err := url.Parse(answer.GetUrl())
	if err != nil {
		return err
	}
	transport, upgrader, err := spdy.RoundTripperFor(&rest.Config{})
	if err != nil {
		return err
	}
	dialer := spdy.NewDialer(upgrader, &http.Client{Transport: transport}, http.MethodPost, address)
	stop, ready := make(chan struct{}), make(chan struct{})
	forwarder, err := portforward.New(dialer, args[1:2], stop, ready, io.Discard, os.Stderr)
	if err != nil {
		return err
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-ready
		fmt.Println("ready")
		<-signals
		close(stop)
	}()
	return forwarder.ForwardPorts()
}

func (c *client) status(args []string) error {
	request := &cri.ContainerStatusRequest{ContainerId: args[0]}
	answer, err := c.runtime.ContainerStatus(c.ctx, request)
	if err != nil {
		return err
	}
	return show(answer.GetStatus())
}

func (c *client) podStatus(args []string) error {
	request := &cri.PodSandboxStatusRequest{PodSandboxId: args[0]}
	answer, err := c.runtime.PodSandboxStatus(c.ctx, request)
	if err != nil {
		return err
	}
	return show(answer.GetStatus())
}

func (c *client) stats(args []string) error {
	answer, err := c.runtime.ContainerStats(c.ctx, &cri.ContainerStatsRequest{ContainerId: args[0]})
	if err != nil {
		return err
	}
	return show(answer.GetStats())
}

func (c *client) podStats(args []string) error {
	answer, err := c.runtime.PodSandboxStats(c.ctx, &cri.PodSandboxStatsRequest{PodSandboxId: args[0]})
	if err != nil {
		return err
	}
	return show(answer.GetStats())
}

func (c *client) update(args []string) error {
	resources := &cri.LinuxContainerResources{}
	if err := read(args[1], resources); err != nil {
		return err
	}
	request := &cri.UpdateContainerResourcesRequest{ContainerId: args[0], Linux: resources}
	_, err := c.runtime.UpdateContainerResources(c.ctx, request)
	return err
}

func (c *client) stop(args []string) error {
	var seconds int64
	if _, err := fmt.Sscan(args[1], &seconds); err != nil {
		return fmt.Errorf("seconds %q: %w", args[1], err)
	}
	_, err := c.runtime.StopContainer(c.ctx, &cri.StopContainerRequest{ContainerId: args[0], Timeout: seconds})
	return err
}

func (c *client) remove(args []string) error {
	_, err := c.runtime.RemoveContainer(c.ctx, &cri.RemoveContainerRequest{ContainerId: args[0]})
	return err
}

func (c *client) stopPod(args []string) error {
	_, err := c.runtime.StopPodSandbox(c.ctx, &cri.StopPodSandboxRequest{PodSandboxId: args[0]})
	return err
}

func (c *client) removePod(args []string) error {
	_, err := c.runtime.RemovePodSandbox(c.ctx, &cri.RemovePodSandboxRequest{PodSandboxId: args[0]})
	return err
}

func (c *client) pods([]string) error {
	answer, err := c.runtime.ListPodSandbox(c.ctx, &cri.ListPodSandboxRequest{})
	for _, pod := range answer.GetItems() {
		fmt.Println(pod.GetId(), pod.GetMetadata().GetName(), pod.GetState())
	}
	return err
}

func (c *client) containers([]string) error {
	answer, err := c.runtime.ListContainers(c.ctx, &cri.ListContainersRequest{})
	for _, container := range answer.GetContainers() {
		fmt.Println(container.GetId(), container.GetMetadata().GetName(), container.GetState())
	}
	return err
}

func (c *client) reopenLog(args []string) error {
	_, err := c.runtime.ReopenContainerLog(c.ctx, &cri.ReopenContainerLogRequest{ContainerId: args[0]})
	return err
}
