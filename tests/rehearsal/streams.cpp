// Streams, events and captured graphs: what waits runs when something waits for it.
#include <algorithm>
#include <memory>
#include <utility>

#include "device.h"

namespace aia::rehearsal {

namespace {

struct Event {
  int device;
  Stream* stream = nullptr;
  uint64_t ticket = 0;  // the work of the stream that it waits for
  Graph* capture = nullptr;
};

// The default streams of the devices, then those that were made. None is ever freed: a handle stays what it is.
std::vector<std::unique_ptr<Stream>>& streams() {
  static std::vector<std::unique_ptr<Stream>> all;
  for (int device = static_cast<int>(all.size()); device < kDevices; ++device)
    all.push_back(std::make_unique<Stream>(Stream{0, device, cudaStreamDefault, 0, {}}));
  return all;
}

void drain(Stream& stream, uint64_t ticket) {
  while (stream.done < ticket && !stream.waiting.empty()) {
    const auto work = std::move(stream.waiting.front());
    stream.waiting.pop_front();
    ++stream.done;
    work();
  }
}

// The default stream of a device and its streams that are not non-blocking wait for each other.
void drain_before(const Stream& stream) {
  if (stream.flags == cudaStreamNonBlocking) return;
  for (size_t i = 0; i < streams().size(); ++i) {
    Stream& other = *streams()[i];
    const bool waits = other.device == stream.device && other.flags != cudaStreamNonBlocking &&
                       (stream.number == 0) != (other.number == 0);
    if (waits) drain(other);
  }
}

Graph* graph_of(const void* handle) { return static_cast<Graph*>(const_cast<void*>(handle)); }

}  // namespace

Stream* stream_of(cudaStream_t handle) {
  if (reinterpret_cast<uintptr_t>(handle) <= 2) return streams()[current_device].get();  // null, legacy, per thread
  for (const auto& stream : streams())
    if (stream.get() == reinterpret_cast<Stream*>(handle)) return stream->alive ? stream.get() : nullptr;
  return nullptr;
}

void queue(Stream& stream, std::function<void()> work) {
  if (stream.capture) {
    stream.capture->nodes.push_back(std::move(work));
    return;
  }
  drain_before(stream);
  stream.waiting.push_back(std::move(work));
  ++stream.queued;
}

void drain(Stream& stream) { drain(stream, stream.queued); }

void drain_all(int device) {
  for (size_t i = 0; i < streams().size(); ++i)
    if (streams()[i]->device == device) drain(*streams()[i]);
}

cudaError_t refuse_in_capture(const Stream* stream, const char* what) {
  const auto captured = [&](const auto& one) { return one->capture && (!stream || stream == one.get()); };
  const bool any = std::any_of(streams().begin(), streams().end(), captured);
  return any ? refuse(cudaErrorStreamCaptureUnsupported, std::string(what) + " during a capture") : cudaSuccess;
}

}  // namespace aia::rehearsal

using namespace aia::rehearsal;

extern "C" {

// The number of a stream, as launches say it: 0 for the default stream of its device.
int rehearsal_stream_number(void* handle) {
  const Lock lock(mutex);
  const Stream* const stream = stream_of(static_cast<cudaStream_t>(handle));
  return stream ? stream->number : -1;
}

// Pieces of work that wait, in all streams.
size_t rehearsal_waiting() {
  const Lock lock(mutex);
  size_t count = 0;
  for (const auto& stream : streams()) count += stream->waiting.size();
  return count;
}

cudaError_t cudaStreamCreateWithPriority(cudaStream_t* handle, unsigned flags, int priority) {
  const Lock lock(mutex);
  const int number = static_cast<int>(streams().size()) - kDevices + 1;
  streams().push_back(std::make_unique<Stream>(Stream{number, current_device, flags, priority, {}}));
  *handle = reinterpret_cast<cudaStream_t>(streams().back().get());
  return cudaSuccess;
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  return cudaStreamCreateWithPriority(handle, flags, 0);
}

cudaError_t cudaStreamCreate(cudaStream_t* handle) { return cudaStreamCreateWithPriority(handle, 0, 0); }

cudaError_t cudaStreamDestroy(cudaStream_t handle) {
  const Lock lock(mutex);
  Stream* const stream = stream_of(handle);
  if (!stream) return refuse(cudaErrorInvalidResourceHandle, "no such stream to destroy");
  drain(*stream);
  stream->alive = false;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  const Lock lock(mutex);
  Stream* const stream = stream_of(handle);
  if (!stream) return refuse(cudaErrorInvalidResourceHandle, "no such stream to wait for");
  if (const cudaError_t error = refuse_in_capture(stream, "a wait for the stream")) return error;
  drain_before(*stream);
  drain(*stream);
  return result(sticky_error);
}

// Whoever asks is answered by doing the work.
cudaError_t cudaStreamQuery(cudaStream_t handle) { return cudaStreamSynchronize(handle); }

cudaError_t cudaStreamGetPriority(cudaStream_t handle, int* priority) {
  const Lock lock(mutex);
  const Stream* const stream = stream_of(handle);
  return *priority = stream ? stream->priority : 0, cudaSuccess;
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event_handle, unsigned) {
  const Lock lock(mutex);
  Stream* const stream = stream_of(handle);
  const auto* const event = reinterpret_cast<Event*>(event_handle);
  if (!stream) return refuse(cudaErrorInvalidResourceHandle, "no such stream to let wait");
  if (event->capture && event->capture == event->stream->capture) {
    stream->capture = event->capture;  // it joins
    return cudaSuccess;
  }
  if (stream->capture) return refuse(cudaErrorStreamCaptureIsolation, "a captured wait for what is not captured");
  if (event->stream) queue(*stream, [of = event->stream, ticket = event->ticket] { drain(*of, ticket); });
  return cudaSuccess;
}

cudaError_t cudaLaunchHostFunc(cudaStream_t handle, cudaHostFn_t call, void* data) {
  const Lock lock(mutex);
  Stream* const stream = stream_of(handle);
  if (!stream) return refuse(cudaErrorInvalidResourceHandle, "a host function on no such stream");
  queue(*stream, [=] { call(data); });
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned) {
  *handle = reinterpret_cast<cudaEvent_t>(new Event{current_device});
  return cudaSuccess;
}

cudaError_t cudaEventCreate(cudaEvent_t* handle) { return cudaEventCreateWithFlags(handle, 0); }

cudaError_t cudaEventDestroy(cudaEvent_t handle) {
  const Lock lock(mutex);
  delete reinterpret_cast<Event*>(handle);
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t handle, cudaStream_t on) {
  const Lock lock(mutex);
  auto* const event = reinterpret_cast<Event*>(handle);
  Stream* const stream = stream_of(on);
  if (!stream) return refuse(cudaErrorInvalidResourceHandle, "an event on no such stream");
  if (stream->device != event->device)
    return refuse(cudaErrorInvalidResourceHandle, "an event of another device than its stream");
  event->stream = stream, event->ticket = stream->queued, event->capture = stream->capture;
  return cudaSuccess;
}

cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return cudaEventRecord(event, stream);
}

cudaError_t cudaEventSynchronize(cudaEvent_t handle) {
  const Lock lock(mutex);
  const auto* const event = reinterpret_cast<Event*>(handle);
  if (event->capture) return refuse(cudaErrorStreamCaptureUnsupported, "a wait for an event of a capture");
  if (event->stream) drain(*event->stream, event->ticket);
  return result(sticky_error);
}

cudaError_t cudaEventQuery(cudaEvent_t event) { return cudaEventSynchronize(event); }
cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 1, cudaSuccess;
}

cudaError_t cudaStreamIsCapturing(cudaStream_t handle, cudaStreamCaptureStatus* status) {
  const Lock lock(mutex);
  const Stream* const stream = stream_of(handle);
  *status = stream && stream->capture ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  return cudaSuccess;
}

cudaError_t cudaStreamGetCaptureInfo(cudaStream_t handle, cudaStreamCaptureStatus* status, unsigned long long* id,
                                     cudaGraph_t* graph, const cudaGraphNode_t** dependencies,
                                     const cudaGraphEdgeData** edges, size_t* count) {
  const Lock lock(mutex);
  cudaStreamIsCapturing(handle, status);
  const Stream* const stream = stream_of(handle);
  Graph* const capture = stream ? stream->capture : nullptr;
  if (id) *id = capture ? capture->number : 0;
  if (graph) *graph = reinterpret_cast<cudaGraph_t>(capture);
  if (dependencies) *dependencies = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}

cudaError_t cudaStreamBeginCapture(cudaStream_t handle, cudaStreamCaptureMode) {
  const Lock lock(mutex);
  Stream* const stream = stream_of(handle);
  if (!stream || stream->number == 0 || stream->capture)
    return refuse(cudaErrorStreamCaptureUnsupported, "a capture of this stream");
  static uint64_t count = 0;
  stream->capture = new Graph{++count, {}};
  return cudaSuccess;
}

cudaError_t cudaStreamEndCapture(cudaStream_t handle, cudaGraph_t* graph) {
  const Lock lock(mutex);
  Stream* const stream = stream_of(handle);
  if (!stream || !stream->capture) return refuse(cudaErrorIllegalState, "an end of no capture");
  Graph* const captured = stream->capture;
  for (const auto& one : streams())
    if (one->capture == captured) one->capture = nullptr;
  *graph = reinterpret_cast<cudaGraph_t>(captured);
  return cudaSuccess;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode*) { return cudaSuccess; }

cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  *executable = reinterpret_cast<cudaGraphExec_t>(new Graph(*graph_of(graph)));
  return cudaSuccess;
}

cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t handle) {
  const Lock lock(mutex);
  Stream* const stream = stream_of(handle);
  if (!stream) return refuse(cudaErrorInvalidResourceHandle, "a graph on no such stream");
  for (const auto& node : graph_of(executable)->nodes) queue(*stream, node);
  return cudaSuccess;
}

cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = graph_of(graph)->nodes.size(), cudaSuccess;
}

cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return delete graph_of(graph), cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return delete graph_of(graph), cudaSuccess; }

}  // extern "C"
