// swift-tools-version: 6.2
import PackageDescription

let package = Package(
    name: "OwnHypervisor",
    dependencies: [.package(name: "Faultline", path: "../..")],
    targets: [
        .executableTarget(
            name: "OwnHypervisor",
            dependencies: [.product(name: "Faultline", package: "Faultline")],
            swiftSettings: [.swiftLanguageMode(.v6)])
    ])
