import ArgumentParser
import LinuxKVM

/// How this machine's KVM is used.
struct DeviceOptions: ParsableArguments {
    @Option(help: "KVM's device.")
    var device = "/dev/kvm"
    @Option(help: ArgumentHelp("A cgroup in which KVM's side makes one of its own.", valueName: "path"))
    var cgroup: String?
    @Option(help: "Seconds that the kernel may take for one call.")
    var deadline = 10

    func validate() throws {
        if deadline < 1 || deadline > 3600 { throw ValidationError("--deadline is 1 to 3600 seconds.") }
    }

    /// `options` with what was given.
    func applied(to options: RealRun.Options) -> RealRun.Options {
        var options = options
        options.path = device
        options.memoryGroup = cgroup
        options.deadline = deadline * 1000
        return options
    }
}
