import ArgumentParser

@main
struct Faultline: ParsableCommand {
    static let configuration = CommandConfiguration(
        commandName: "faultline", abstract: "KVM's guest-memory core, in a laboratory.")
}
