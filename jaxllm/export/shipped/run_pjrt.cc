// Token ids that follow token ids, greedily, with the exported model in a folder and any plugin of PJRT's C API:
// libtpu.so for TPUs, xla_cuda_plugin.so for NVIDIA's GPUs, xla_cpu_pjrt.so for CPUs.
//
//   g++ -std=c++17 -O2 run_pjrt.cc -o run_pjrt -I$INCLUDE -ldl         (docs/export_stablehlo.md: what $INCLUDE has)
//   ./run_pjrt PLUGIN.so FOLDER COUNT 12 7 99
//
// Everything about the programs is read from FOLDER/manifest.json: arguments and results are its ports, in order.
#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#if __has_include("xla/pjrt/c/pjrt_c_api.h")
#include "xla/pjrt/c/pjrt_c_api.h"
#else
#include "pjrt_c_api.h"
#endif

[[noreturn]] static void fail(const std::string& sentence) { throw std::runtime_error(sentence); }

static std::string contents(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) fail(path + " cannot be read: give a folder that jaxllm.export has finished");
  std::ostringstream all;
  all << file.rdbuf();
  return all.str();
}

// ---- JSON: the manifest, and the header of a safetensors file ---------------------------------------------------

struct Json {
  std::string text;  // of a string, number, true, false or null
  std::vector<Json> items;
  std::map<std::string, Json> fields;

  const Json& operator[](const std::string& name) const {
    auto found = fields.find(name);
    if (found == fields.end()) fail("the manifest or a parameter file has no \"" + name + "\"; export the model again");
    return found->second;
  }
  bool has(const std::string& name) const { return fields.count(name) != 0; }
  int64_t number() const { return std::strtoll(text.c_str(), nullptr, 10); }
};

class Parser {
 public:
  explicit Parser(const std::string& text) : at_(text.data()), end_(text.data() + text.size()) {}

  Json value() {
    Json made;
    switch (peek()) {
      case '{':
        list('}', [&] {
          std::string name = string();
          expect(':');
          made.fields[name] = value();
        });
        return made;
      case '[':
        list(']', [&] { made.items.push_back(value()); });
        return made;
      case '"':
        made.text = string();
        return made;
      default:
        while (at_ < end_ && !std::strchr(",]} \t\r\n", *at_)) made.text += *at_++;
        return made;
    }
  }

 private:
  char peek() {
    while (at_ < end_ && std::strchr(" \t\r\n", *at_)) ++at_;
    if (at_ == end_) fail("a JSON file ends too early; export the model again");
    return *at_;
  }
  void expect(char wanted) {
    if (peek() != wanted) fail(std::string("a JSON file has ") + *at_ + " where " + wanted + " belongs; export again");
    ++at_;
  }
  template <class Item>
  void list(char last, Item item) {
    ++at_;
    for (bool first = true; peek() != last; first = false) {
      if (!first) expect(',');
      peek();
      item();
    }
    ++at_;
  }
  std::string string() {  // \uXXXX stay as they are written: no name that is looked up has any
    std::string made;
    expect('"');
    for (; at_ < end_ && *at_ != '"'; ++at_) {
      if (*at_ == '\\' && at_ + 1 < end_ && at_[1] != 'u') ++at_;
      made += *at_;
    }
    expect('"');
    return made;
  }
  const char *at_, *end_;
};

static Json parsed(const std::string& text) { return Parser(text).value(); }

// ---- arrays ---------------------------------------------------------------------------------------------

struct Kind {
  PJRT_Buffer_Type type;
  int64_t bytes;
};

static Kind kind_of(const std::string& dtype) {
  static const std::map<std::string, Kind> kinds = {
      {"float64", {PJRT_Buffer_Type_F64, 8}},         {"float32", {PJRT_Buffer_Type_F32, 4}},
      {"float16", {PJRT_Buffer_Type_F16, 2}},         {"bfloat16", {PJRT_Buffer_Type_BF16, 2}},
      {"float8_e4m3fn", {PJRT_Buffer_Type_F8E4M3FN, 1}}, {"float8_e5m2", {PJRT_Buffer_Type_F8E5M2, 1}},
      {"float8_e8m0fnu", {PJRT_Buffer_Type_F8E8M0FNU, 1}}, {"bool", {PJRT_Buffer_Type_PRED, 1}},
      {"int8", {PJRT_Buffer_Type_S8, 1}},             {"uint8", {PJRT_Buffer_Type_U8, 1}},
      {"int16", {PJRT_Buffer_Type_S16, 2}},           {"uint16", {PJRT_Buffer_Type_U16, 2}},
      {"int32", {PJRT_Buffer_Type_S32, 4}},           {"uint32", {PJRT_Buffer_Type_U32, 4}}};
  auto found = kinds.find(dtype);
  if (found == kinds.end()) fail("this example knows no arrays of " + dtype + "; add it to kind_of");
  return found->second;
}

struct Port {  // of the manifest
  std::string name, role, dtype;
  std::vector<int64_t> shape;
  int64_t initial = 0;

  explicit Port(const Json& port) : name(port["name"].text), role(port["role"].text), dtype(port["dtype"].text) {
    for (const Json& size : port["shape"].items) {
      shape.push_back(size.number());
    }
    if (port.has("initial")) initial = port["initial"].number();
  }
  int64_t count() const {
    int64_t made = 1;
    for (int64_t size : shape) made *= size;
    return made;
  }
};

static std::vector<Port> ports(const Json& list) { return {list.items.begin(), list.items.end()}; }

// ---- the plugin -----------------------------------------------------------------------------------------

// The arguments of a function of the C API, zeros but for their size.
#define ARGUMENTS(name, function)    \
  PJRT_##function##_Args name = {};  \
  name.struct_size = PJRT_##function##_Args_STRUCT_SIZE
#define CALL(function, args) check(api_->PJRT_##function(&args), #function)

class Device {
 public:
  explicit Device(const char* plugin) {
    void* library = dlopen(plugin, RTLD_NOW | RTLD_LOCAL);
    if (!library) fail(std::string("the plugin cannot be loaded: ") + dlerror());
    auto get = reinterpret_cast<const PJRT_Api* (*)()>(dlsym(library, "GetPjrtApi"));
    if (!get) fail(std::string(plugin) + " exports no GetPjrtApi: it is no plugin of PJRT's C API");
    api_ = get();
    if (api_->pjrt_api_version.major_version != PJRT_API_MAJOR) {
      fail("the plugin has another major version of PJRT's C API than the header this was compiled with");
    }
    ARGUMENTS(ready, Plugin_Initialize);
    CALL(Plugin_Initialize, ready);
    ARGUMENTS(client, Client_Create);
    CALL(Client_Create, client);
    client_ = client.client;
    ARGUMENTS(devices, Client_AddressableDevices);
    devices.client = client_;
    CALL(Client_AddressableDevices, devices);
    if (!devices.num_addressable_devices) fail("the plugin has no device here");
    device_ = devices.addressable_devices[0];
  }

  // StableHLO that the plugin reads at most, as "1.13.7"; "" where it does not say.
  std::string newest() const {
    ARGUMENTS(all, Plugin_Attributes);
    CALL(Plugin_Attributes, all);
    for (size_t i = 0; i < all.num_attributes; ++i) {
      const PJRT_NamedValue& one = all.attributes[i];
      if (std::string(one.name, one.name_size) != "stablehlo_current_version") continue;
      std::string made;
      for (size_t k = 0; k < one.value_size; ++k) made += (k ? "." : "") + std::to_string(one.int64_array_value[k]);
      return made;
    }
    return "";
  }

  PJRT_LoadedExecutable* compile(std::string code) const {
    // CompileOptionsProto {executable_build_options {num_replicas: 1 num_partitions: 1}}
    static const char options[] = "\x1a\x04\x20\x01\x28\x01";
    PJRT_Program program = {};
    program.struct_size = PJRT_Program_STRUCT_SIZE;
    program.code = code.data();
    program.code_size = code.size();
    program.format = "mlir";
    program.format_size = 4;
    ARGUMENTS(args, Client_Compile);
    args.client = client_;
    args.program = &program;
    args.compile_options = options;
    args.compile_options_size = sizeof options - 1;
    CALL(Client_Compile, args);
    return args.executable;
  }

  PJRT_Buffer* put(const Port& port, const void* data) const {
    ARGUMENTS(args, Client_BufferFromHostBuffer);
    args.client = client_;
    args.data = data;
    args.type = kind_of(port.dtype).type;
    args.dims = port.shape.data();
    args.num_dims = port.shape.size();
    args.host_buffer_semantics = PJRT_HostBufferSemantics_kImmutableUntilTransferCompletes;
    args.device = device_;
    CALL(Client_BufferFromHostBuffer, args);
    wait(args.done_with_host_buffer);
    return args.buffer;
  }

  // Results in the order of the program's. What the program may use again of the arguments (the state) is then gone.
  std::vector<PJRT_Buffer*> run(PJRT_LoadedExecutable* program, const std::vector<PJRT_Buffer*>& arguments,
                                size_t results) const {
    std::vector<PJRT_Buffer*> made(results);
    PJRT_Buffer* const* inputs = arguments.data();
    PJRT_Buffer** outputs = made.data();
    PJRT_ExecuteOptions options = {};
    options.struct_size = PJRT_ExecuteOptions_STRUCT_SIZE;
    ARGUMENTS(args, LoadedExecutable_Execute);
    args.executable = program;
    args.options = &options;
    args.argument_lists = &inputs;
    args.num_devices = 1;
    args.num_args = arguments.size();
    args.output_lists = &outputs;
    CALL(LoadedExecutable_Execute, args);
    return made;
  }

  // The first axis' first row of an array of 4-byte numbers, the last axis running fastest.
  template <class Number>
  std::vector<Number> row(const Port& port, PJRT_Buffer* buffer) const {
    std::vector<Number> all(port.count());
    std::vector<int64_t> order(port.shape.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int64_t>(order.size() - 1 - i);
    PJRT_Buffer_MemoryLayout layout = {};
    layout.struct_size = PJRT_Buffer_MemoryLayout_STRUCT_SIZE;
    layout.type = PJRT_Buffer_MemoryLayout_Type_Tiled;
    layout.tiled.struct_size = PJRT_Buffer_MemoryLayout_Tiled_STRUCT_SIZE;
    layout.tiled.minor_to_major = order.data();
    layout.tiled.minor_to_major_size = order.size();
    ARGUMENTS(args, Buffer_ToHostBuffer);
    args.src = buffer;
    args.host_layout = &layout;
    args.dst = all.data();
    args.dst_size = all.size() * sizeof(Number);
    CALL(Buffer_ToHostBuffer, args);
    wait(args.event);
    all.resize(all.size() / port.shape[0]);
    return all;
  }

  void release(PJRT_Buffer* buffer) const {
    ARGUMENTS(args, Buffer_Destroy);
    args.buffer = buffer;
    CALL(Buffer_Destroy, args);
  }

 private:
  void wait(PJRT_Event* event) const {
    if (!event) return;  // a plugin that has finished at once
    ARGUMENTS(args, Event_Await);
    args.event = event;
    CALL(Event_Await, args);
    ARGUMENTS(gone, Event_Destroy);
    gone.event = event;
    CALL(Event_Destroy, gone);
  }

  void check(PJRT_Error* error, const char* function) const {
    if (!error) return;
    ARGUMENTS(said, Error_Message);
    said.error = error;
    api_->PJRT_Error_Message(&said);
    std::string message(said.message, said.message_size);
    ARGUMENTS(gone, Error_Destroy);
    gone.error = error;
    api_->PJRT_Error_Destroy(&gone);
    fail(std::string("PJRT_") + function + ": " + message);
  }

  const PJRT_Api* api_ = nullptr;
  PJRT_Client* client_ = nullptr;
  PJRT_Device* device_ = nullptr;
};

// ---- the model ------------------------------------------------------------------------------------------

using Arrays = std::map<std::string, PJRT_Buffer*>;

// Bytes of every tensor in a safetensors file (8 bytes: size of the header; header; data), mapped and not read.
static void load(const Device& device, const std::string& path, const std::map<std::string, Port>& wanted,
                 Arrays& found) {
  int file = open(path.c_str(), O_RDONLY);
  struct stat about;
  if (file < 0 || fstat(file, &about)) fail(path + " cannot be read; export the model again");
  auto size = static_cast<uint64_t>(about.st_size);
  void* mapped = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
  close(file);
  if (mapped == MAP_FAILED) fail(path + " cannot be mapped into memory");
  auto data = static_cast<const char*>(mapped);
  uint64_t header = 0;
  if (size >= 8) std::memcpy(&header, data, 8);
  if (size < 8 || header > size - 8) fail(path + " is no safetensors file; export the model again");
  for (const auto& [name, entry] : parsed(std::string(data + 8, header)).fields) {
    if (name == "__metadata__") continue;
    auto port = wanted.find(name);
    if (port == wanted.end()) fail("no program has a parameter " + name + "; export the model again");
    uint64_t start = entry["data_offsets"].items.at(0).number(), stop = entry["data_offsets"].items.at(1).number();
    uint64_t bytes = port->second.count() * kind_of(port->second.dtype).bytes;
    if (stop > size - 8 - header || stop - start != bytes) fail(name + " has another size than the manifest says");
    found[name] = device.put(port->second, data + 8 + header + start);
  }
  munmap(mapped, size);
}

struct Program {
  std::vector<Port> inputs, outputs;
  PJRT_LoadedExecutable* code;
};

class Model {
 public:
  Model(const Device& device, const std::string& folder)
      : device_(device), manifest_(parsed(contents(folder + "/manifest.json"))) {
    std::map<std::string, Port> wanted;
    for (const char* name : {"prefill", "decode"}) {
      const Json& about = manifest_["programs"][name];
      Program made = {ports(about["inputs"]), ports(about["outputs"]), nullptr};
      for (const Port& port : made.inputs) {
        if (port.role == "parameter") wanted.insert({port.name, port});
      }
      made.code = compiled(contents(folder + "/" + about["files"]["stablehlo"].text));
      programs_.insert({name, made});
    }
    for (const Json& file : manifest_["parameters"].items) load(device_, folder + "/" + file.text, wanted, params_);
    for (const auto& [name, port] : wanted) {
      if (!params_.count(name)) fail("the parameter " + name + " is in no file; export the model again");
    }
  }

  // Prints `count` ids that follow `ids`, fewer where there is no room for more.
  void generate(const std::vector<int32_t>& ids, int64_t count) {
    const auto chunk = static_cast<size_t>(manifest_["chunk"].number());
    const int64_t room = manifest_["context"].number();  // 0: a window, that goes on for ever
    if (ids.empty() || (room && static_cast<int64_t>(ids.size()) > room)) {
      fail("the prompt has " + std::to_string(ids.size()) + " tokens; this export takes 1 to " + std::to_string(room));
    }
    begin();
    int32_t token = 0;
    for (size_t start = 0; start < ids.size(); start += chunk) {
      size_t stop = std::min(ids.size(), start + chunk);
      token = step("prefill", {ids.begin() + start, ids.begin() + stop}, chunk, 0);
    }
    for (int64_t drawn = 1;; ++drawn) {
      std::printf("%d ", token);
      std::fflush(stdout);
      if (drawn == count || (room && static_cast<int64_t>(ids.size()) + drawn > room)) break;
      token = step("decode", {token}, 1, static_cast<int32_t>(drawn));
    }
    std::printf("\n");
  }

 private:
  PJRT_LoadedExecutable* compiled(const std::string& code) const {
    try {
      return device_.compile(code);
    } catch (const std::runtime_error& error) {
      std::string written = manifest_["target"]["versions"]["stablehlo"].text, newest = device_.newest();
      fail(std::string(error.what()) + "\n(the programs are StableHLO " + written + ", and the plugin reads up to " +
           (newest.empty() ? "a version that it does not say" : newest) + ")");
    }
  }

  // An empty state: each array full of its `initial`.
  void begin() {
    for (const auto& [name, buffer] : state_) device_.release(buffer);
    state_.clear();
    for (const Port& port : programs_.at("decode").inputs) {
      if (port.role != "state") continue;
      if (port.initial && port.dtype != "int32") fail("an empty " + port.name + " is of int32 or zeros");
      std::vector<int32_t> values((port.count() * kind_of(port.dtype).bytes + 3) / 4,
                                  static_cast<int32_t>(port.initial));
      state_[port.name] = device_.put(port, values.data());
    }
  }

  // The token after these, which lie in room for `width`. Rows of a batch are alike; the first is read.
  int32_t step(const char* name, std::vector<int32_t> tokens, size_t width, int32_t drawn) {
    const Program& program = programs_.at(name);
    const auto real = static_cast<int32_t>(tokens.size());
    tokens.resize(width, 0);
    std::vector<PJRT_Buffer*> arguments, inputs;
    for (const Port& port : program.inputs) {
      if (port.role == "input") inputs.push_back(device_.put(port, input(port, tokens, real, drawn).data()));
      arguments.push_back(port.role == "parameter" ? params_.at(port.name)
                          : port.role == "state"   ? state_.at(port.name)
                                                   : inputs.back());
    }
    std::vector<PJRT_Buffer*> results = device_.run(program.code, arguments, program.outputs.size());
    for (const auto& [state, buffer] : state_) device_.release(buffer);
    for (PJRT_Buffer* buffer : inputs) device_.release(buffer);
    int32_t token = 0;
    for (size_t i = 0; i < results.size(); ++i) {
      const Port& port = program.outputs[i];
      if (port.role == "state") {
        state_[port.name] = results[i];
        continue;
      }
      if (port.name == "token") token = device_.row<int32_t>(port, results[i]).at(0);
      if (port.name == "logits") token = best(device_.row<float>(port, results[i]));
      device_.release(results[i]);
    }
    return token;
  }

  // Bits of an input's numbers, each of 4 bytes: a sampler inside is given what makes it greedy.
  static std::vector<int32_t> input(const Port& port, const std::vector<int32_t>& tokens, int32_t real,
                                    int32_t drawn) {
    std::vector<int32_t> made;
    if (port.name == "tokens") {
      for (int64_t row = 0; row < port.shape[0]; ++row) made.insert(made.end(), tokens.begin(), tokens.end());
      return made;
    }
    int32_t value = port.name == "n_new" ? real : port.name == "step" ? drawn : 0;
    const float one = 1;
    if (port.name == "top_p" || port.name == "repetition_penalty") std::memcpy(&value, &one, 4);
    return std::vector<int32_t>(port.count(), value);
  }

  static int32_t best(const std::vector<float>& logits) {
    return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
  }

  const Device& device_;
  Json manifest_;
  std::map<std::string, Program> programs_;
  Arrays params_, state_;
};

int main(int argc, char** argv) {
  if (argc < 5) {
    std::fprintf(stderr, "usage: %s PLUGIN.so FOLDER COUNT ID...\n", argv[0]);
    return 2;
  }
  std::vector<int32_t> ids;
  for (int i = 4; i < argc; ++i) ids.push_back(std::atoi(argv[i]));
  try {
    Device device(argv[1]);
    Model(device, argv[2]).generate(ids, std::atoll(argv[3]));
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
  std::fflush(stdout);
  std::_Exit(0);  // the device is given back with the process; plugins differ in what their own threads take
}
