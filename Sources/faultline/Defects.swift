import ArgumentParser
import Report

struct Defects: ParsableCommand {
    static let configuration = CommandConfiguration(
        abstract: "The museum: mistakes that `check --defect NAME` can switch on, and where they come from.")

    @Flag(help: "Print the list as JSON.")
    var json = false

    func run() { output(json ? MuseumText.json() : MuseumText.render(.standardOutput)) }
}
