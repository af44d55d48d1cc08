import IoctlScript
import Testing

/// Two sides' answers: what differs is shown with both.
@Suite struct Comparisons {
    private func comparison(_ first: [Answer], _ second: [Answer]) throws -> Comparison {
        Comparison(try Script("vm", "ring_reset", "vcpu"), ("model", first), ("kvm", second))
    }

    @Test func `answers that are the same are not shown`() throws {
        let same = try comparison([.done, .done, .done], [.done, .done, .done])
        #expect(same.differences.isEmpty && same.text == "0 of 3 answers differ\n" && same.json == "[]\n")
    }

    @Test func `what differs, and what one side can't do`() throws {
        let two = try comparison(
            [.done, Answer(.failed(22)), .done], [.done, Answer(.failed(25)), Answer(.notHere("no room"))])
        #expect(two.differences.map(\.line.number) == [2])
        #expect(
            two.text == """
                2: ring_reset vm=vm
                    model: -1 EINVAL
                    kvm:   -1 ENOTTY
                3: vcpu vm=vm id=0
                    not compared
                    model: 0
                    kvm:   not here: no room
                1 of 3 answers differ, 1 not compared

                """)
        #expect(
            two.json == """
                [
                  {"line": 2, "compared": true, "model": {"result": -1, "errno": "EINVAL"}, "kvm": {"result": -1, "errno": "ENOTTY"}},
                  {"line": 3, "compared": false, "model": {"result": 0}, "kvm": {"not_here": "no room"}}
                ]

                """)
    }

    @Test func `of a side that ended early the rest is left out`() throws {
        let early = try comparison([.done, .done, .done], [.done])
        #expect(early.text == "0 of 1 answers differ\n")
    }
}
