// Greedy generation with a model exported by jaxllm, on macOS 15 or iOS 18 and newer.
//
//   swiftc -O -parse-as-library generate.swift -o generate
//   ./generate . 64 1 306 4658 278          (the folder, how many tokens, the prompt's ids)
//
// Text becomes ids with tokenizer.json, in Swift for example through github.com/huggingface/swift-transformers.

import CoreML
import Foundation

struct Manifest: Decodable {
    let chunk: Int
    let context: Int?
    let batch: Int
}

/// One row of text. Keys and values stay in the state; how many tokens it holds is counted here.
final class Generator {
    let manifest: Manifest
    private let prefill: MLModel
    private let decode: MLModel
    private var state: MLState
    private var length = 0

    init(folder: URL, units: MLComputeUnits = .cpuAndGPU) async throws {
        let data = try Data(contentsOf: folder.appending(path: "manifest.json"))
        manifest = try JSONDecoder().decode(Manifest.self, from: data)
        guard manifest.batch == 1 else { throw Failure.batch(manifest.batch) }
        // An app ships the compiled model, which Xcode makes of the package.
        let compiled = try await MLModel.compileModel(at: folder.appending(path: "model.mlpackage"))
        func load(_ name: String) async throws -> MLModel {
            let configuration = MLModelConfiguration()
            configuration.functionName = name
            configuration.computeUnits = units
            return try await MLModel.load(contentsOf: compiled, configuration: configuration)
        }
        prefill = try await load("prefill")
        decode = try await load("decode")
        state = decode.makeState()
    }

    /// Forget everything.
    func reset() {
        state = decode.makeState()
        length = 0
    }

    /// Append tokens -> the logits of the one after them.
    func feed(_ tokens: [Int32]) async throws -> MLShapedArray<Float> {
        if let room = manifest.context, length + tokens.count > room { throw Failure.full(room) }
        if tokens.count == 1 { return try await step(decode, tokens, size: 1) }
        var logits: MLShapedArray<Float>?
        for start in stride(from: 0, to: tokens.count, by: manifest.chunk) {
            let part = Array(tokens[start..<min(start + manifest.chunk, tokens.count)])
            logits = try await step(prefill, part, size: manifest.chunk)
        }
        guard let logits else { throw Failure.nothing }
        return logits
    }

    private func step(_ model: MLModel, _ tokens: [Int32], size: Int) async throws -> MLShapedArray<Float> {
        let padded = tokens + Array(repeating: 0, count: size - tokens.count)
        let inputs = try MLDictionaryFeatureProvider(dictionary: [
            "tokens": MLFeatureValue(shapedArray: MLShapedArray<Int32>(scalars: padded, shape: [1, size])),
            "n_new": MLFeatureValue(shapedArray: MLShapedArray<Int32>(scalars: [Int32(tokens.count)], shape: [1])),
            "length": MLFeatureValue(shapedArray: MLShapedArray<Int32>(scalars: [Int32(length)], shape: [1])),
        ])
        let found = try await model.prediction(from: inputs, using: state)
        guard let logits = found.featureValue(for: "logits")?.shapedArrayValue(of: Float.self) else {
            throw Failure.nothing
        }
        length += tokens.count
        return logits
    }
}

enum Failure: Error {
    case batch(Int), full(Int), nothing, usage
}

func best(_ logits: MLShapedArray<Float>) -> Int32 {
    let scores = logits.scalars
    return Int32(scores.indices.max { scores[$0] < scores[$1] }!)
}

@main
struct Main {
    static func main() async throws {
        let words = CommandLine.arguments.dropFirst()
        let numbers = words.dropFirst().compactMap { Int32($0) }
        guard let folder = words.first, numbers.count > 1, numbers.count == words.count - 1 else {
            throw Failure.usage
        }
        let generator = try await Generator(folder: URL(filePath: folder))
        var token = best(try await generator.feed(Array(numbers.dropFirst())))
        for _ in 0..<numbers[0] {
            print(token, terminator: " ")
            fflush(stdout)
            token = best(try await generator.feed([token]))
        }
        print()
    }
}
