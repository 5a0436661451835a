// From fragments of an MP4 to a video element, by Media Source Extensions: for browsers that have no
// decoder for packets in this page (WebCodecs need https, or this machine).
//
// The same methods as `Player`. A video element reads ahead; so what is put in place of frames that
// were taken back is reached by a jump to it, once the frames before it were shown.

import { Hold } from "./hold.js";

const SLOWEST = 0.25; // of the rate that is meant
const BEHIND = 20; // seconds that are kept of what was shown
const SOON = 0.001; // seconds: a time inside of a frame, not on its edge

export class FilmPlayer {
  constructor(film, onShown) {
    this.film = film;
    this.onShown = onShown;
    this.onFailed = () => {}; // told what cannot be played
    this.lead = 2; // frames that may be on their way to the screen
    this.running = true;
    this.shown = -1;
    this.hold = new Hold();
    this.jump = null; // a frame to go on with, once those before it were shown
    this.work = Promise.resolve(); // what is done with the buffer, one after the other
  }

  // Begin with what `video.start` says, again after the connection was lost; frames before its first
  // one stay. Throws if this browser cannot play it.
  async begin({ codec, fps, first_frame: first }) {
    if (this.buffer) {
      this.flush(first);
      this.hold.end();
      return;
    }
    const type = `video/mp4; codecs="${codec}"`;
    if (!("MediaSource" in window)) throw new Error("no-mse");
    if (!MediaSource.isTypeSupported(type)) throw new Error("no-h264");
    this.fps = this.rate = fps;
    this.jump = first;
    this.source = new MediaSource();
    this.film.src = URL.createObjectURL(this.source);
    await new Promise((done) => { this.source.onsourceopen = done; });
    URL.revokeObjectURL(this.film.src);
    this.buffer = this.source.addSourceBuffer(type);
    this.film.requestVideoFrameCallback((now, about) => this.drawn(now, about));
    this.timer = setInterval(() => this.tick(), 15);
  }

  async add(chunk, packets) {
    this.hold.add(chunk.first_frame);
    this.do(() => this.buffer.appendBuffer(packets[0]));
    const old = this.film.currentTime - BEHIND;
    if (old > BEHIND) this.do(() => this.buffer.remove(0, old));
    this.keepUp(chunk.frames);
  }

  // Play more slowly if frames come more slowly than they are meant to be shown.
  keepUp(frames) {
    const now = performance.now();
    if (this.last) {
      const made = (1000 * frames) / (now - this.last);
      this.rate += 0.3 * (Math.max(SLOWEST * this.fps, Math.min(this.fps, made)) - this.rate);
      this.film.playbackRate = this.rate / this.fps;
    }
    this.last = now;
  }

  // One step with the buffer, when those before it are done.
  do(step) {
    this.work = this.work.then(() => {
      if (!this.running) return null;
      return new Promise((done, fail) => {
        this.buffer.addEventListener("updateend", done, { once: true });
        try { step(); } catch (error) { fail(error); }
      });
    }).catch((error) => this.onFailed(error));
  }

  drawn(now, about) {
    if (!this.running) return;
    this.film.requestVideoFrameCallback((later, next) => this.drawn(later, next));
    const frame = Math.round(about.mediaTime * this.fps);
    if (frame <= this.shown) return;
    this.shown = frame;
    this.onShown(frame, now);
  }

  tick() {
    const waits = this.film.readyState < HTMLMediaElement.HAVE_FUTURE_DATA;
    if (this.jump !== null && (this.shown >= this.jump - 1 || waits) && this.has(this.jump)) {
      this.film.currentTime = this.jump / this.fps + SOON;
      this.jump = null;
    }
    const stop = this.paused || this.shown + 1 >= this.hold.stop;
    if (stop && !this.film.paused) this.film.pause();
    if (!stop && this.film.paused) this.film.play().catch(() => {});
  }

  // Whether a frame is in the buffer.
  has(frame) {
    const { buffered } = this.buffer;
    const time = frame / this.fps + SOON;
    for (let i = 0; i < buffered.length; i++) {
      if (buffered.start(i) <= time && time < buffered.end(i)) return true;
    }
    return false;
  }

  // Frames from `frame` on are not to be shown.
  flush(frame) {
    this.hold.flush(frame);
    this.do(() => this.buffer.remove(frame / this.fps - SOON, Infinity));
    this.jump = frame;
    this.last = 0; // the time until the next chunk says nothing about the rate
  }

  stop() {
    this.running = false;
    clearInterval(this.timer);
    this.film.removeAttribute("src");
    this.film.load();
  }
}
