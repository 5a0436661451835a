// What may be shown while a change is on its way.
//
// With a change the page promises the server not to show chunks that begin at some frame or later,
// for they may be taken back. Chunks that begin before it are shown to their end.

export class Hold {
  constructor() {
    this.boundaries = []; // first frames of the last chunks that came
    this.from = Infinity;
  }

  // A chunk came.
  add(first) {
    this.boundaries = [...this.boundaries.slice(-15), first];
  }

  // Promise it, until change number `id` is answered.
  begin(frame, id) {
    this.from = Math.min(this.from, frame);
    this.id = id;
  }

  // The server has answered change number `id`, or all of them.
  end(id = Infinity) {
    if (id >= (this.id ?? 0)) this.from = Infinity;
  }

  // Frames from `frame` on were taken back.
  flush(frame) {
    this.boundaries = this.boundaries.filter((first) => first < frame);
  }

  // The first frame that is not to be shown now.
  get stop() {
    return Math.min(Infinity, ...this.boundaries.filter((first) => first >= this.from));
  }
}
