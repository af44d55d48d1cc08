// RaceStress: real threads on the MMUs of x86, to be built with ThreadSanitizer.
//
//     swift build --sanitize=thread --product RaceStress
//     .build/debug/RaceStress [--seconds 20] [--seed N] [--plant]
//
// Under the TDP MMU, then under the shadow MMU: two vCPUs fault, the process changes its mappings, its pages are aged and
// moved, the dirty log is read and cleared, logging is turned on and off, slots come and go. Whatever two threads touch
// without a lock or an atomic operation between them ThreadSanitizer reports, and the process ends with 66.
//
// `--plant` adds such a mistake: a counter that both vCPUs raise as if it were their own. It shows that the net holds.

import Foundation
import Frames
import GuestMemory
import HostMemory
import Synchrony

struct Arguments {
    var seconds = 20.0
    var seed = UInt64.random(in: 1...0xffff_ffff)
    var plants = false

    init(_ words: [String]) {
        var words = words[...]
        while let word = words.popFirst() {
            switch word {
            case "--plant": plants = true
            case "--seconds":
                guard let value = words.popFirst().flatMap(Double.init), value > 0 else { Self.refuse(word) }
                seconds = value
            case "--seed":
                guard let value = words.popFirst().flatMap({ UInt64($0) }) else { Self.refuse(word) }
                seed = value
            default: Self.refuse(word)
            }
        }
    }

    private static func refuse(_ word: String) -> Never {
        say("error: \(word); RaceStress [--seconds N] [--seed N] [--plant]")
        exit(2)
    }
}

/// At once, whatever becomes of the process.
func say(_ line: String) { FileHandle.standardOutput.write(Data((line + "\n").utf8)) }

let arguments = Arguments(Array(CommandLine.arguments.dropFirst()))
say("seed \(arguments.seed), \(arguments.seconds) s\(arguments.plants ? ", with a race planted" : "")")
var failures = 0
for kind in [StressedWorld.Kind.tdp, .shadow] {
    let world = StressedWorld(kind, plants: arguments.plants)
    world.run(seconds: arguments.seconds / 2, seed: arguments.seed)
    say("\(kind): \(world.summary)")
    for failure in world.end() {
        say("error: \(failure)")
        failures += 1
    }
}
exit(failures == 0 ? 0 : 1)
