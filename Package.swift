// swift-tools-version: 6.2
import PackageDescription

/// Every Swift target: Swift 6 mode, and a warning is an error.
let strict: [SwiftSetting] = [.swiftLanguageMode(.v6), .treatAllWarnings(as: .error)]

/// The core also compiles in Embedded Swift; permits are `~Escapable`, which needs the lifetime attributes.
let core: [SwiftSetting] = strict + [.enableExperimentalFeature("Lifetimes")]

let package = Package(
    name: "Faultline",
    products: [
        .library(
            name: "Faultline",
            targets: [
                "Frames", "Synchrony", "Audit", "HostMemory", "GuestMemory", "Paging", "Hardware", "LogConsumers",
                "Machine",
            ]),
        .library(name: "FaultlineTools", targets: ["Scenario", "TraceAudit", "Report"]),
        .executable(name: "faultline", targets: ["faultline"]),
    ],
    dependencies: [
        .package(url: "https://github.com/apple/swift-argument-parser", from: "1.8.0"),
        .package(url: "https://github.com/jpsim/Yams", from: "6.2.0"),
        .package(url: "https://github.com/swiftlang/swift-subprocess", from: "1.0.0"),
    ],
    targets: [
        // The core, leaf first. It imports nothing but the standard library and Synchronization.
        .target(name: "CSchedule"),
        .target(name: "Frames", swiftSettings: core),
        .target(name: "Synchrony", dependencies: ["CSchedule"], swiftSettings: core),
        .target(name: "Audit", dependencies: ["Frames"], swiftSettings: core),
        .target(name: "HostMemory", dependencies: ["Frames", "Synchrony", "Audit"], swiftSettings: core),
        .target(
            name: "GuestMemory", dependencies: ["Frames", "Synchrony", "Audit", "HostMemory"], swiftSettings: core),
        .target(
            name: "Paging", dependencies: ["Frames", "Synchrony", "Audit", "HostMemory", "GuestMemory"],
            swiftSettings: core),
        .target(name: "Hardware", dependencies: ["Frames", "Synchrony", "Audit", "HostMemory"], swiftSettings: core),

        // Outside the core, but compiled in Embedded Swift with it.
        .target(name: "LogConsumers", dependencies: ["Frames", "Synchrony"], swiftSettings: core),
        .target(
            name: "Machine",
            dependencies: [
                "Frames", "Synchrony", "Audit", "HostMemory", "GuestMemory", "Paging", "Hardware", "LogConsumers",
            ], swiftSettings: core),
        // Fibers and the handler of traps.
        .target(name: "CFiber"),
        .target(name: "SeededRandom", swiftSettings: strict),
        // The processor's walks over hostile tables.
        .target(
            name: "WalkFuzz",
            dependencies: [
                "CSchedule", "Frames", "Synchrony", "Audit", "HostMemory", "GuestMemory", "Paging", "Hardware",
                "Machine",
                "SeededRandom",
            ], swiftSettings: strict),
        .target(
            name: "Explorer", dependencies: ["CFiber", "CSchedule", "Synchrony", "SeededRandom"], swiftSettings: strict),
        // A plan as the explorer's subject, and the museum of defects.
        .target(
            name: "Laboratory",
            dependencies: ["Explorer", "Machine", "HostMemory", "Audit", "CSchedule", "CFiber", "Frames"],
            swiftSettings: strict),
        // Texts that people write, and what is wrong with them.
        .target(name: "TextInput", swiftSettings: strict),
        .target(name: "JSONOutput", swiftSettings: strict),
        .target(
            name: "Scenario", dependencies: ["Machine", "TextInput", .product(name: "Yams", package: "Yams")],
            swiftSettings: strict),
        .target(
            name: "TraceAudit",
            dependencies: ["Audit", "JSONOutput", .product(name: "Subprocess", package: "swift-subprocess")],
            swiftSettings: strict),
        // Files of rules that say why a difference is none.
        .target(
            name: "Explanations", dependencies: [.product(name: "Yams", package: "Yams")], swiftSettings: strict),
        // A recording's ground truth on the model, beside what the kernel told.
        .target(
            name: "Replay",
            dependencies: [
                "TraceAudit", "JSONOutput", "Machine", "Paging", "GuestMemory", "HostMemory", "Audit", "Frames",
                "Explanations",
            ], swiftSettings: strict),
        .target(
            name: "Report",
            dependencies: ["Scenario", "TraceAudit", "JSONOutput", "Machine", "Laboratory", "Explorer"],
            swiftSettings: strict),
        // KVM's calls on the model, and scripts of such calls, which know no model.
        .target(name: "CKVMInterface"),
        .target(
            name: "IoctlScript", dependencies: ["CKVMInterface", "TextInput", "SeededRandom"], swiftSettings: strict),
        .target(
            name: "Interface",
            dependencies: [
                "CKVMInterface", "IoctlScript", "Frames", "Audit", "HostMemory", "GuestMemory", "Paging", "Machine",
            ], swiftSettings: strict),
        // Linux's system calls as numbers with a result.
        .target(name: "CSystemCalls"),
        // The same scripts on this machine's KVM.
        .target(name: "CLinuxKVM", dependencies: ["CSystemCalls", "CKVMInterface"]),
        .target(
            name: "LinuxKVM", dependencies: ["CLinuxKVM", "CSystemCalls", "CKVMInterface", "IoctlScript"],
            swiftSettings: strict),
        // Random scripts on both.
        .target(
            name: "Conformance",
            dependencies: [
                "LinuxKVM", "CKVMInterface", "Interface", "IoctlScript", "TextInput", "Frames", "Audit", "HostMemory",
                "Machine", "Explanations", "JSONOutput",
                "Report", "Replay", "TraceAudit",
            ],
            resources: [
                .embedInCode("Rules/known.yaml"), .embedInCode("Rules/traced.yaml"),
                .embedInCode("Claims/claims.ioctl"),
            ],
            swiftSettings: strict),
        // The host model beside this machine's kernel.
        .target(name: "CHostProcess", dependencies: ["CSystemCalls"]),
        .target(
            name: "HostConformance",
            dependencies: ["CHostProcess", "Frames", "HostMemory", "Machine", "Audit", "SeededRandom"],
            swiftSettings: strict),
        .target(name: "CBenchmarkLimits"),
        .target(
            name: "Benchmarks",
            dependencies: [
                "Machine", "Report", "JSONOutput", "Interface", "IoctlScript", "CBenchmarkLimits", "SeededRandom",
            ],
            swiftSettings: strict),
        // Real threads on the MMUs of x86, for ThreadSanitizer.
        .executableTarget(
            name: "RaceStress",
            dependencies: [
                "Machine", "Paging", "GuestMemory", "HostMemory", "Audit", "Synchrony", "Frames", "SeededRandom",
            ], swiftSettings: strict),
        .executableTarget(
            name: "faultline",
            dependencies: [
                "Scenario", "TraceAudit", "Report", "Benchmarks", "Machine", "Explorer", "Laboratory",
                "HostConformance", "TextInput", "IoctlScript", "Interface", "LinuxKVM", "Conformance",
                "Explanations", "Replay", "WalkFuzz",
                .product(name: "ArgumentParser", package: "swift-argument-parser"),
            ], swiftSettings: strict),

        .testTarget(
            name: "CoreTests",
            dependencies: [
                "CSchedule", "Frames", "Synchrony", "Audit", "HostMemory", "GuestMemory", "Paging", "Hardware",
                "Machine", "SeededRandom", "WalkFuzz",
            ],
            exclude: ["Emulator/walk.S"], swiftSettings: core),
        .testTarget(
            name: "ExplorerTests",
            dependencies: [
                "Explorer", "Laboratory", "Scenario", "Machine", "Audit", "Frames", "CSchedule", "Synchrony",
                "SeededRandom",
            ],
            swiftSettings: strict),
        .testTarget(
            name: "HostConformanceTests", dependencies: ["HostConformance", "HostMemory", "Machine", "SeededRandom"],
            swiftSettings: strict),
        .testTarget(
            name: "InterfaceTests",
            dependencies: [
                "CKVMInterface", "IoctlScript", "Interface", "TextInput", "Machine", "GuestMemory", "HostMemory",
                "Audit", "Frames", "SeededRandom",
            ],
            swiftSettings: strict),
        .testTarget(
            name: "LinuxKVMTests",
            dependencies: [
                "LinuxKVM", "Conformance", "Explanations", "Audit", "IoctlScript", "Interface", "TextInput", "Machine",
                "Scenario",
                "CKVMInterface",
            ],
            exclude: ["Scripts"], swiftSettings: strict),
        .testTarget(
            name: "LogConsumersTests",
            dependencies: [
                "LogConsumers", "Machine", "HostMemory", "GuestMemory", "Audit", "Frames", "Synchrony", "SeededRandom",
            ],
            swiftSettings: core),
        // Compiles the programs in `Snippets` itself, against the modules that this target makes SwiftPM build.
        .testTarget(
            name: "TypeRuleTests",
            dependencies: ["Frames", "Synchrony", "Audit", "HostMemory", "GuestMemory"],
            exclude: ["Snippets"], swiftSettings: core),
        .testTarget(
            name: "CommandTests", dependencies: ["faultline", "Report", "Scenario", "TraceAudit"],
            swiftSettings: strict),
        .testTarget(
            name: "TraceAuditTests", dependencies: ["TraceAudit", "Replay", "Explanations"], swiftSettings: strict),
        .testTarget(
            name: "ScenarioTests",
            dependencies: ["Scenario", "TextInput", "Report", "SeededRandom", .product(name: "Yams", package: "Yams")],
            swiftSettings: strict),
    ]
)
