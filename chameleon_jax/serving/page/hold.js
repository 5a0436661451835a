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

  // Promise it.
  begin(frame) {
    this.from = Math.min(this.from, frame);
  }

  // The server has answered.
  end() {
    this.from = Infinity;
  }

  // Frames from `frame` on were taken back.
  flush(frame) {
    this.end();
    this.boundaries = this.boundaries.filter((first) => first < frame);
  }

  // The first frame that is not to be shown now.
  get stop() {
    return Math.min(Infinity, ...this.boundaries.filter((first) => first >= this.from));
  }
}
