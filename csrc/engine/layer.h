// What the layers of the adaptation engine share: the call of a layer over the rows of one task.
//
// A layer is four functions over such a call:
//
//   forward         y
//   backward        gx and parameter gradients, from gy
//   dual_forward    y and its tangent dy, from x, dx and the parameters' tangents
//   dual_backward   gx and its tangent dgx, and (tangents of) parameter gradients, from gy and dgy
//
// The tangents are along one direction of the parameters (and so of the values downstream): dual
// passes over the support loss give a Hessian-vector product, forward over reverse. A null pointer
// among the tangent inputs (dx, dw, db) is a zero tangent; a null pointer among the outputs (gx,
// gw, gb, dgx, dgw, dgb) is one that nobody wants.
//
// Values are [rows, pixels, ld] with ld >= channels: flat features have one pixel, images are
// [rows, height, width, channels]. Lanes of a row past its channels are padding that holds anything
// finite in values and zero in cotangents (gy, dgy come with zeros there, gx, dgx must leave
// zeros). A prediction of few channels is [channels, rows], padding past its rows likewise.
#pragma once
#include <cstdint>

#include "common/vec.h"
#include "engine/program.h"

namespace fastmeta::engine::FASTMETA_ISA {

using namespace fastmeta::FASTMETA_ISA;

namespace convolution {
template <class T>
struct Places;
}

template <class T>
struct LayerCall {
  const Node* node = nullptr;  // kind, attributes and shapes
  int64_t rows = 0;            // of this pass

  const T* x = nullptr;    // first input
  const T* dx = nullptr;   // its tangent
  const T* x2 = nullptr;   // second input (add)
  const T* dx2 = nullptr;  // its tangent
  T* y = nullptr;
  T* dy = nullptr;

  const T* w = nullptr;  // parameters in the engine's layout (plan.h)
  const T* b = nullptr;
  const T* dw = nullptr;
  const T* db = nullptr;
  const T* mean = nullptr;  // running statistics, constants
  const T* var = nullptr;

  const T* gy = nullptr;
  const T* dgy = nullptr;
  T* gx = nullptr;  // written, or added to where add_gx says so
  T* dgx = nullptr;
  T* gx2 = nullptr;
  T* dgx2 = nullptr;
  bool add_gx = false, add_gx2 = false;
  // Dual passes alone: y holds the value already, and gx and gx2 are nullptr, for they do too.
  bool known = false;
  T* gw = nullptr;  // parameter gradients are added to what is there
  T* gb = nullptr;
  T* dgw = nullptr;
  T* dgb = nullptr;
  // Of linear layers alone: where `from` is given, gw and gb become from + factor * gradient, a
  // parameter after its update.
  struct Update {
    const T* from = nullptr;
    T factor = T(1);
  };
  Update w_update, b_update;

  // conv2d: where its numbers lie (convolution_places.h).
  const convolution::Places<T>* places = nullptr;
  // linear: x as [inputs, rows], where no step changes it (product::turn_input).
  T* turned_x = nullptr;

  // saved_bytes(node, rows) bytes that stay untouched from forward to backward, 64-byte aligned:
  // statistics, places of maxima. The dual passes use the same block.
  void* saved = nullptr;
  // scratch_bytes(node, rows) bytes for use within one function.
  void* scratch = nullptr;

  // Dropout: identity of the pass (see dropout.h).
  uint64_t seed = 0;
  int64_t pass = 0, task = 0;
};

}  // namespace fastmeta::engine::FASTMETA_ISA
