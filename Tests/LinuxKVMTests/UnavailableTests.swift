import IoctlScript
import LinuxKVM
import Testing

/// What can't be used is told before anything runs. These need no device.
@Suite struct Unavailability {
    private func reason(_ path: String) -> String? {
        var options = RealRun.Options()
        options.path = path
        do throws(RealRun.Unavailable) {
            _ = try RealRun(options)
            return nil
        } catch {
            return error.reason
        }
    }

    @Test func `a device that is not there, and one that is no KVM`() {
        #expect(reason("/nowhere") == "/nowhere can't be opened: ENOENT")
        #expect(reason("/dev/null") == "/dev/null is no KVM that this program knows")
    }

    @Test func `a cgroup in which none can be made`() {
        var options = RealRun.Options()
        options.memoryGroup = "/nowhere"
        #expect(throws: RealRun.Unavailable.self) { _ = try RealRun(options) }
    }
}
