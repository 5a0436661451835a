// From packets to the canvas, with a clock of its own: what is shown is known to the frame.
//
// Frames wait in `queue` in their order. `flush` drops those that the server has taken back; what
// comes after begins with a key frame, so the decoder goes on without a break. If frames come more
// slowly than they are meant to be shown, all of them are shown more slowly, rather than in jerks.

import { Hold } from "./hold.js";

const SLOWEST = 4; // frames a second

export class Player {
  constructor(canvas, onShown) {
    this.canvas = canvas;
    this.pen = canvas.getContext("2d", { alpha: false });
    this.onShown = onShown;
    this.onFailed = () => {}; // told what cannot be decoded
    this.queue = []; // {frame, picture}
    this.coming = new Map(); // frames that are being decoded, by the number of their packet
    this.packets = 0;
    this.next = 0;
    this.paused = false;
    this.rate = 0;
    this.hold = new Hold();
    this.lead = 0; // frames that may be on their way to the screen
    this.running = true;
    requestAnimationFrame((now) => this.tick(now));
  }

  // Begin with what `video.start` says, again after the connection was lost; frames before its first
  // one stay. Throws if this browser cannot play it.
  async begin({ codec, width, height, fps, first_frame: first }) {
    this.fps = fps;
    this.rate = fps;
    this.jpeg = codec === "jpeg";
    if (this.decoder?.state === "configured") await this.decoder.flush();
    this.flush(first);
    this.hold.end();
    if (this.canvas.width !== width || this.canvas.height !== height) {
      Object.assign(this.canvas, { width, height }); // which clears it
    }
    if (this.jpeg) return;
    if (!("VideoDecoder" in window)) throw new Error("no-webcodecs");
    const config = { codec, codedWidth: width, codedHeight: height, optimizeForLatency: true };
    if (!(await VideoDecoder.isConfigSupported(config)).supported) throw new Error("no-h264");
    this.close();
    this.decoder = new VideoDecoder({
      output: (picture) => this.arrived(picture.timestamp, picture),
      error: (error) => this.onFailed(error),
    });
    this.decoder.configure(config);
  }

  async add(chunk, packets) {
    this.hold.add(chunk.first_frame);
    packets.forEach((data, i) => {
      const number = this.packets++;
      this.coming.set(number, chunk.first_frame + i);
      if (this.jpeg) {
        createImageBitmap(new Blob([data], { type: "image/jpeg" }))
          .then((picture) => this.arrived(number, picture));
        return;
      }
      const type = i === 0 && chunk.key ? "key" : "delta";
      this.decoder.decode(new EncodedVideoChunk({ type, timestamp: number, data }));
    });
    const now = performance.now();
    if (this.last) {
      const made = (1000 * packets.length) / (now - this.last);
      const wanted = Math.max(SLOWEST, Math.min(this.fps, made));
      this.rate += 0.3 * (wanted - this.rate);
    }
    this.last = now;
  }

  arrived(number, picture) {
    const frame = this.coming.get(number);
    this.coming.delete(number);
    if (frame === undefined) { // taken back while it was being decoded
      picture.close();
      return;
    }
    this.queue.push({ frame, picture });
    this.queue.sort((a, b) => a.frame - b.frame);
  }

  // Frames from `frame` on are not to be shown.
  flush(frame) {
    this.hold.flush(frame);
    this.queue.filter((one) => one.frame >= frame).forEach((one) => one.picture.close());
    this.queue = this.queue.filter((one) => one.frame < frame);
    for (const [number, coming] of this.coming) {
      if (coming >= frame) this.coming.delete(number);
    }
    this.last = 0; // the time until the next chunk says nothing about the rate
  }

  tick(now) {
    if (!this.running) return;
    requestAnimationFrame((later) => this.tick(later));
    if (this.paused || !this.queue.length || now < this.next) return;
    if (this.queue[0].frame >= this.hold.stop) return;
    const { frame, picture } = this.queue.shift();
    this.pen.drawImage(picture, 0, 0, this.canvas.width, this.canvas.height);
    picture.close();
    const interval = 1000 / (this.rate || this.fps);
    this.next = Math.max(this.next + interval, now);
    this.onShown(frame, now);
  }

  stop() {
    this.running = false;
    this.flush(-1);
    this.close();
  }

  close() {
    if (this.decoder && this.decoder.state !== "closed") this.decoder.close();
  }
}
