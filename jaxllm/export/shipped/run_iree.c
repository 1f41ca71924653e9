// Token ids that follow token ids, greedily, with the exported model in this folder and IREE's runtime.
//
//   add_subdirectory(iree EXCLUDE_FROM_ALL)  # IREE's sources, with -DIREE_BUILD_COMPILER=OFF
//   add_executable(run_iree run_iree.c)
//   target_link_libraries(run_iree iree::runtime iree::modules::io::parameters iree::io::parameter_index_provider
//                         iree::io::formats::parser_registry)
//
//   ./run_iree local-task model.vmfb model.irpa CHUNK COUNT 12 7 99
//
// iree_runtime_unified lacks the other three, and IREE warns of mixing it with other targets. A compiler called
// without CMake needs -DIREE_ALLOCATOR_SYSTEM_CTL=iree_allocator_libc_ctl.
//
// CHUNK is `chunk` of manifest.json, whose `batch` is 1 and whose sampler is outside; the ids and COUNT together fit
// in its `context`. The arguments of a function are the ports of role "input", in the manifest's order: n_new, tokens.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "iree/io/file_handle.h"
#include "iree/io/formats/parser_registry.h"
#include "iree/io/parameter_index.h"
#include "iree/io/parameter_index_provider.h"
#include "iree/modules/io/parameters/module.h"
#include "iree/runtime/api.h"

// The parameters in an .irpa file, for modules that ask for those of the scope "model".
static iree_status_t append_parameters(iree_runtime_instance_t* instance, iree_runtime_session_t* session,
                                       const char* path) {
  iree_allocator_t allocator = iree_runtime_session_host_allocator(session);
  iree_io_file_handle_t* file = NULL;
  iree_io_parameter_index_t* index = NULL;
  iree_io_parameter_provider_t* provider = NULL;
  iree_vm_module_t* module = NULL;
  iree_string_view_t name = iree_make_cstring_view(path);
  iree_status_t status = iree_io_parameter_index_create(allocator, &index);
  if (iree_status_is_ok(status)) status = iree_io_file_handle_open(IREE_IO_FILE_MODE_READ, name, allocator, &file);
  if (iree_status_is_ok(status)) status = iree_io_parse_file_index(name, file, index, allocator);
  if (iree_status_is_ok(status)) {
    status = iree_io_parameter_index_provider_create(
        iree_make_cstring_view("model"), index, IREE_IO_PARAMETER_INDEX_PROVIDER_DEFAULT_MAX_CONCURRENT_OPERATIONS,
        allocator, &provider);
  }
  if (iree_status_is_ok(status)) {
    status = iree_io_parameters_module_create(iree_runtime_instance_vm_instance(instance), 1, &provider, allocator,
                                              &module);
  }
  if (iree_status_is_ok(status)) status = iree_runtime_session_append_module(session, module);
  iree_vm_module_release(module);
  iree_io_parameter_provider_release(provider);
  iree_io_parameter_index_release(index);
  iree_io_file_handle_release(file);
  return status;
}

// One argument: `data`, i32 of a shape.
static iree_status_t push(iree_runtime_session_t* session, iree_runtime_call_t* call, iree_host_size_t rank,
                          const iree_hal_dim_t* shape, const int32_t* data) {
  iree_host_size_t count = 1;
  for (iree_host_size_t i = 0; i < rank; ++i) count *= (iree_host_size_t)shape[i];
  iree_hal_buffer_params_t params = {.usage = IREE_HAL_BUFFER_USAGE_DEFAULT,
                                     .access = IREE_HAL_MEMORY_ACCESS_ALL,
                                     .type = IREE_HAL_MEMORY_TYPE_DEVICE_LOCAL};
  iree_hal_buffer_view_t* view = NULL;
  IREE_RETURN_IF_ERROR(iree_hal_buffer_view_allocate_buffer_copy(
      iree_runtime_session_device(session), iree_runtime_session_device_allocator(session), rank, shape,
      IREE_HAL_ELEMENT_TYPE_INT_32, IREE_HAL_ENCODING_TYPE_DENSE_ROW_MAJOR, params,
      iree_make_const_byte_span(data, count * sizeof(int32_t)), &view));
  iree_status_t status = iree_runtime_call_inputs_push_back_buffer_view(call, view);
  iree_hal_buffer_view_release(view);
  return status;
}

// The most probable token of logits f32 [1, V], or an error.
static iree_status_t best_of(iree_runtime_session_t* session, iree_hal_buffer_view_t* logits, int32_t* token) {
  iree_device_size_t size = iree_hal_buffer_view_byte_length(logits);
  float* scores = (float*)malloc((size_t)size);
  if (!scores) return iree_make_status(IREE_STATUS_RESOURCE_EXHAUSTED, "no memory for the logits");
  iree_status_t status = iree_hal_device_transfer_d2h(
      iree_runtime_session_device(session), iree_hal_buffer_view_buffer(logits), 0, scores, size,
      IREE_HAL_TRANSFER_BUFFER_FLAG_DEFAULT, iree_infinite_timeout());
  if (iree_status_is_ok(status)) {
    *token = 0;
    for (iree_device_size_t i = 1; i < size / sizeof(float); ++i) {
      if (scores[i] > scores[*token]) *token = (int32_t)i;
    }
  }
  free(scores);
  return status;
}

// The token after `count` more of them, which lie in room for `width`: "model.prefill" or "model.decode".
static iree_status_t step(iree_runtime_session_t* session, const char* function, const int32_t* tokens,
                          int32_t count, int32_t width, int32_t* token) {
  iree_runtime_call_t call;
  IREE_RETURN_IF_ERROR(iree_runtime_call_initialize_by_name(session, iree_make_cstring_view(function), &call));
  iree_hal_dim_t shape[] = {1, (iree_hal_dim_t)width};
  iree_hal_buffer_view_t* logits = NULL;
  iree_status_t status = push(session, &call, 1, shape, &count);
  if (iree_status_is_ok(status)) status = push(session, &call, 2, shape, tokens);
  if (iree_status_is_ok(status)) status = iree_runtime_call_invoke(&call, 0);
  if (iree_status_is_ok(status)) status = iree_runtime_call_outputs_pop_front_buffer_view(&call, &logits);
  if (iree_status_is_ok(status)) status = best_of(session, logits, token);
  iree_hal_buffer_view_release(logits);
  iree_runtime_call_deinitialize(&call);
  return status;
}

// Empty the state, for another conversation; one that was just loaded needs it, too.
static iree_status_t reset(iree_runtime_session_t* session) {
  iree_runtime_call_t call;
  IREE_RETURN_IF_ERROR(
      iree_runtime_call_initialize_by_name(session, iree_make_cstring_view("model.reset"), &call));
  iree_status_t status = iree_runtime_call_invoke(&call, 0);
  iree_runtime_call_deinitialize(&call);
  return status;
}

static iree_status_t generate(iree_runtime_session_t* session, int32_t chunk, int32_t more, int32_t count,
                              const int32_t* ids) {
  int32_t token = 0, *part = (int32_t*)malloc((size_t)chunk * sizeof(int32_t));
  if (!part) return iree_make_status(IREE_STATUS_RESOURCE_EXHAUSTED, "no memory for a chunk");
  iree_status_t status = reset(session);
  for (int32_t start = 0; start < count && iree_status_is_ok(status); start += chunk) {
    int32_t real = count - start < chunk ? count - start : chunk;
    memset(part, 0, (size_t)chunk * sizeof(int32_t));
    memcpy(part, ids + start, (size_t)real * sizeof(int32_t));
    status = step(session, "model.prefill", part, real, chunk, &token);
  }
  free(part);
  for (int32_t i = 0; i < more && iree_status_is_ok(status); ++i) {
    printf("%d ", (int)token);
    fflush(stdout);
    if (i + 1 < more) status = step(session, "model.decode", &token, 1, 1, &token);
  }
  printf("\n");
  return status;
}

int main(int argc, char** argv) {
  int32_t chunk = argc < 7 ? 0 : (int32_t)atoi(argv[4]);
  if (chunk < 1) {
    fprintf(stderr, "usage: %s DRIVER VMFB IRPA CHUNK COUNT ID...  (CHUNK is `chunk` of manifest.json)\n", argv[0]);
    return 2;
  }
  int32_t count = argc - 6, *ids = (int32_t*)malloc((size_t)count * sizeof(int32_t));
  if (!ids) return 1;
  for (int32_t i = 0; i < count; ++i) ids[i] = (int32_t)atoi(argv[6 + i]);
  iree_allocator_t allocator = iree_allocator_system();
  iree_runtime_instance_t* instance = NULL;
  iree_hal_device_t* device = NULL;
  iree_runtime_session_t* session = NULL;
  iree_runtime_instance_options_t instance_options;
  iree_runtime_instance_options_initialize(&instance_options);
  iree_runtime_instance_options_use_all_available_drivers(&instance_options);
  iree_runtime_session_options_t session_options;
  iree_runtime_session_options_initialize(&session_options);
  iree_status_t status = iree_runtime_instance_create(&instance_options, allocator, &instance);
  if (iree_status_is_ok(status)) {
    status = iree_runtime_instance_try_create_default_device(instance, iree_make_cstring_view(argv[1]), &device);
  }
  if (iree_status_is_ok(status)) {
    status = iree_runtime_session_create_with_device(instance, &session_options, device, allocator, &session);
  }
  if (iree_status_is_ok(status)) status = append_parameters(instance, session, argv[3]);
  if (iree_status_is_ok(status)) {
    status = iree_runtime_session_append_bytecode_module_from_file(session, argv[2]);
  }
  if (iree_status_is_ok(status)) {
    status = generate(session, chunk, (int32_t)atoi(argv[5]), count, ids);
  }
  int failed = !iree_status_is_ok(status);
  if (failed) {
    iree_status_fprint(stderr, status);
    iree_status_free(status);
  }
  iree_runtime_session_release(session);
  iree_hal_device_release(device);
  iree_runtime_instance_release(instance);
  free(ids);
  return failed;
}
