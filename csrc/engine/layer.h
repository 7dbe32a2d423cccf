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
// zeros).
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
  const Node* node;  // kind, attributes and shapes
  int64_t rows;      // of this pass

  const T* x;    // first input
  const T* dx;   // its tangent
  const T* x2;   // second input (add)
  const T* dx2;  // its tangent
  T* y;
  T* dy;

  const T* w;  // parameters in the engine's layout (program.h)
  const T* b;
  const T* dw;
  const T* db;
  const T* mean;  // running statistics, constants
  const T* var;

  const T* gy;
  const T* dgy;
  T* gx;  // written, or added to where add_gx says so
  T* dgx;
  T* gx2;
  T* dgx2;
  bool add_gx, add_gx2;
  // Dual passes alone: y holds the value already, and gx and gx2 are nullptr, for they do too.
  bool known;
  T* gw;  // parameter gradients are added to what is there
  T* gb;
  T* dgw;
  T* dgb;

  // conv2d: where its numbers lie (convolution_places.h).
  const convolution::Places<T>* places;

  // saved_bytes(node, rows) bytes that stay untouched from forward to backward, 64-byte aligned:
  // statistics, places of maxima. The dual passes use the same block.
  void* saved;
  // scratch_bytes(node, rows) bytes for use within one function.
  void* scratch;

  // Dropout: identity of the pass (see dropout.h).
  uint64_t seed;
  int64_t pass, task;
};

}  // namespace fastmeta::engine::FASTMETA_ISA
