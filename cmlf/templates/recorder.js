// Runs in the audio thread: hands the samples of the microphone to the page.
class Recorder extends AudioWorkletProcessor {
  process([input]) {
    if (input.length) this.port.postMessage(input[0].slice())
    return true
  }
}
registerProcessor('recorder', Recorder)
