// Runs beside the page: the microphone's samples as pieces of s16le.
const PIECE = 1600; // 100 ms at 16 kHz

class Recorder extends AudioWorkletProcessor {
  constructor() {
    super();
    this.piece = new Int16Array(PIECE);
    this.length = 0;
  }

  process(inputs) {
    for (const sample of inputs[0][0] ?? []) {
      this.piece[this.length++] = Math.max(-1, Math.min(1, sample)) * 32767;
      if (this.length === PIECE) {
        this.port.postMessage(this.piece.buffer.slice(0));
        this.length = 0;
      }
    }
    return true;
  }
}

registerProcessor("recorder", Recorder);
