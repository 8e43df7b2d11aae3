// The page of `cmlf serve`. The address holds the query, so links and the back button repeat it.
// What the server sends is shown with textContent: markup in a caption stays text.
'use strict'

const $ = id => document.getElementById(id)
const limits = document.body.dataset
const STEP = 10          // results that are added by "More results"
const uploads = new Map() // sounds of this visit, so that the back button can repeat them
let current = null       // the request in progress

// --- numbers as text

function clock(seconds) { // 0:04.5 or 1:02:03
  const tenths = Math.round(seconds * 10), all = Math.floor(tenths / 10), two = n => String(n).padStart(2, '0')
  const h = Math.floor(all / 3600), m = Math.floor(all / 60) % 60, s = all % 60
  return h ? `${h}:${two(m)}:${two(s)}` : `${m}:${two(s)}.${tenths % 10}`
}

const whole = hit => hit.stop - hit.start >= hit.seconds - .05

function range(hit) {
  if (whole(hit)) return `whole sound, ${clock(hit.seconds)}`
  return `match at ${clock(hit.start)}–${clock(hit.stop)} of ${clock(hit.seconds)}`
}

const copy = id => $(id).content.firstElementChild.cloneNode(true)
const element = (tag, textContent, more = {}) => Object.assign(document.createElement(tag), {textContent, ...more})
const count = (n, what) => `${n} ${what}${n === 1 ? '' : 's'}`

// --- asking the server

async function ask(address, options = {}) {
  current?.abort()
  const mine = current = new AbortController()
  let answer
  try {
    answer = await fetch(address, {...options, signal: mine.signal})
    const found = await answer.json()
    if (answer.ok) return found
    throw Object.assign(new Error(found.error), {status: answer.status})
  } catch (e) {
    if (e.name === 'AbortError' || e.status) throw e
    throw new Error('The server does not answer. Is “cmlf serve” still running?')
  } finally {
    if (current === mine) current = null
  }
}

// What the address and the history ask for: a function that asks the server, and what is known before.
function request() {
  const asked = new URLSearchParams(location.search), k = asked.get('k') ?? STEP
  const upload = uploads.get(history.state?.upload)
  if (upload) return {name: upload.name, own: upload.address,
                      answer: () => send(upload, k)}
  if (asked.has('like')) return {own: `/sound/${asked.get('like')}`, from: +asked.get('start') || 0,
                                 answer: () => ask(`/like/${encodeURIComponent(asked.get('like'))}?${part(asked)}k=${k}`)}
  if (asked.has('q')) return {name: asked.get('q'),
                              answer: () => ask(`/search?${new URLSearchParams({q: asked.get('q'), k})}`)}
}

const part = asked => ['start', 'stop'].filter(n => asked.has(n)).map(n => `${n}=${encodeURIComponent(asked.get(n))}&`).join('')

async function send(upload, k) {
  const address = `/like?${new URLSearchParams({name: upload.name, k})}`
  try { return await ask(address, {method: 'POST', body: upload.sound}) }
  catch (e) {
    if (e.status !== 415 || upload.decoded) throw e
    // the server cannot read it, but this browser may: m4a, webm
    upload.decoded = await decode(upload.sound)
    if (!upload.decoded) throw e
    upload.sound = upload.decoded
    return send(upload, k)
  }
}

// --- showing what was found

async function run({focus = false, keep = false} = {}) {
  const asked = request()
  report()
  say('')
  $('q').value = new URLSearchParams(location.search).get('q') ?? ''
  document.body.classList.toggle('asked', !!asked)
  if ($('examples')) $('examples').hidden = !!asked
  if (!asked) {
    current?.abort()
    busy(false)
    document.title = 'Sound search'
    return $('found').hidden = true
  }
  busy(true)
  try { show(await asked.answer(), asked, keep) }
  catch (e) {
    if (e.name === 'AbortError') return
    $('found').hidden = true
    busy(false)
    say('')
    report(e.message)
  }
  if (focus && !$('found').hidden) { $('heading').focus({preventScroll: true}); scrollTo({top: 0}) }
}

let slow = 0
function busy(on) {
  $('found').setAttribute('aria-busy', on)
  clearTimeout(slow)
  if (on) slow = setTimeout(() => say('Searching…'), 200)
}

// What a screen reader says; results are seen by everybody else.
function say(line, unseen = false) {
  $('status').textContent = line
  $('status').classList.toggle('hidden', unseen)
}

function report(line = '') { $('error').textContent = line }

function show(found, asked, keep) {
  $('found').hidden = false
  document.title = `${asked.name ?? found.name} – Sound search`
  $('heading').textContent = asked.own ? `Sounds like ${found.name}` : `Sounds for “${asked.name}”`
  showMine(found, asked)
  const list = $('results')
  if (!keep) list.replaceChildren()
  list.append(...found.results.slice(list.children.length).map(card))
  showMore(found)
  busy(false)
  say(`${count(found.results.length, 'result')} of ${count(found.sounds, 'sound')}`, true)
}

function showMine(found, asked) {
  $('mine').replaceChildren()
  if (!asked.own) return
  const node = copy('mine-card'), get = s => node.querySelector(s), sentences = found.sentences
  get('img').src = found.picture
  get('img').alt = `Spectrogram of ${found.name}`
  setPlayer(node, asked.own, asked.from ?? 0, found.seconds, found.name)
  get('.sentences').append(...sentences.map(sentence))
  if (!sentences.length) get('.text').replaceChildren(element('p', 'The index has no captions.'))
  $('mine').append(node)
}

function showMore(found) {
  const more = new URL(location), next = Math.min(found.results.length + STEP, +limits.most)
  more.searchParams.set('k', next)
  $('more').href = more.pathname + more.search
  $('more').hidden = found.results.length >= found.sounds || found.results.length >= +limits.most
}

function sentence(found) {
  const node = copy('sentence')
  node.querySelector('a').textContent = found.caption
  node.querySelector('a').href = `/?${new URLSearchParams({q: found.caption})}`
  node.querySelector('.score').textContent = found.score.toFixed(2)
  return node
}

function card(hit) {
  const node = copy('card'), get = s => node.querySelector(s), [caption, ...others] = hit.captions
  const span = {start: hit.start, stop: hit.stop}
  get('.rank').textContent = `${hit.rank}.`
  get('.file').textContent = hit.file
  get('.score').textContent = `score ${hit.score.toFixed(3)}`
  get('.bar i').style.width = `${Math.max(0, 100 * hit.score)}%`
  get('.range').textContent = range(hit)
  get('img').src = `/spectrogram/${hit.sound}?${new URLSearchParams(span)}`
  get('img').alt = `Spectrogram of ${hit.file}, ${clock(hit.start)} to ${clock(hit.stop)}`
  get('.caption').textContent = caption ?? ''
  get('.more').hidden = !others.length
  get('summary').textContent = count(others.length, 'more caption')
  get('.more ul').append(...others.map(c => element('li', c)))
  get('.like').href = `/?${new URLSearchParams({like: hit.sound, ...span})}`
  get('.like').setAttribute('aria-label', `More like this: ${hit.file}`)
  get('.where').hidden = whole(hit)
  get('.where i').style.left = `${100 * hit.start / hit.seconds}%`
  get('.where i').style.width = `${100 * (hit.stop - hit.start) / hit.seconds}%`
  setPlayer(node, `/sound/${hit.sound}`, hit.start, hit.stop - hit.start, hit.file)
  return node
}

// --- players: start where the match is, one at a time, with a line in the spectrogram

function setPlayer(node, address, start, seconds, name) {
  const audio = node.querySelector('audio'), now = node.querySelector('.now'), picture = node.querySelector('.picture')
  audio.src = `${address}#t=${start}`
  audio.setAttribute('aria-label', `Play ${name}`)
  audio.onerror = () => {
    node.querySelector('.problem').hidden = false
    node.querySelector('.problem').textContent = 'This sound cannot be played.'
  }
  const move = () => {
    const at = (audio.currentTime - start) / seconds
    now.hidden = !(at >= 0 && at <= 1)
    now.style.left = `${100 * at}%`
    if (!audio.paused) requestAnimationFrame(move)
  }
  audio.onplay = () => {
    for (const other of document.querySelectorAll('audio')) if (other !== audio) other.pause()
    move()
  }
  audio.onseeked = move
  picture.onclick = e => { // for the mouse; the player itself works with the keyboard
    const box = picture.getBoundingClientRect()
    const at = start + seconds * (e.clientX - box.left) / box.width
    const play = () => { audio.currentTime = at; audio.play() }
    if (audio.readyState) play()
    else { audio.addEventListener('loadedmetadata', play, {once: true}); audio.preload = 'metadata'; audio.load() }
  }
}

// --- sounds of one's own

function take(sound, name) {
  if (sound.size > +limits.bytes) return report(`${name}: larger than ${limits.bytes / 1e6} MB; cut it first`)
  const upload = crypto.randomUUID()
  uploads.set(upload, {sound, name, address: URL.createObjectURL(sound)})
  go('/', {upload})
}

async function decode(blob) {
  try {
    const found = await new OfflineAudioContext(1, 1, 32000).decodeAudioData(await blob.arrayBuffer())
    const mono = new Float32Array(found.length)
    for (let c = 0; c < found.numberOfChannels; c++)
      found.getChannelData(c).forEach((x, i) => mono[i] += x / found.numberOfChannels)
    return wav([mono], found.sampleRate)
  } catch { return null }
}

// A wav file, 16 bits, mono, from blocks of samples.
function wav(blocks, rate) {
  const n = blocks.reduce((sum, b) => sum + b.length, 0), view = new DataView(new ArrayBuffer(44 + 2 * n))
  const text = (at, word) => [...word].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)))
  text(0, 'RIFF'); view.setUint32(4, 36 + 2 * n, true); text(8, 'WAVEfmt ')
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true)
  view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true); view.setUint16(32, 2, true)
  view.setUint16(34, 16, true); text(36, 'data'); view.setUint32(40, 2 * n, true)
  let at = 44
  for (const block of blocks) for (const x of block) {
    view.setInt16(at, Math.max(-1, Math.min(1, x)) * 32767, true); at += 2
  }
  return new Blob([view], {type: 'audio/wav'})
}

// A microphone, without the filters for speech: they remove what should be found.
const microphone = () => navigator.mediaDevices.getUserMedia({audio: {
  channelCount: 1, echoCancellation: false, noiseSuppression: false, autoGainControl: false}})

let recording = null // a function that stops the recording

async function record() {
  if (recording) return recording()
  report()
  const blocks = [], button = $('record'), label = text => button.querySelector('span').textContent = text
  let stream
  button.disabled = true
  try { stream = await microphone() }
  catch (e) {
    return report(e.name === 'NotAllowedError' ? 'The browser does not allow this page to use the microphone.'
                                               : 'No microphone was found.')
  } finally { button.disabled = false }
  const context = new AudioContext()
  recording = () => {
    recording = null
    stream.getTracks().forEach(track => track.stop())
    context.close()
    button.classList.remove('on')
    label('Record')
    take(wav(blocks, context.sampleRate), 'recording.wav')
  }
  button.classList.add('on')
  label('Stop (0:00.0)')
  await context.audioWorklet.addModule('/files/recorder.js')
  const node = new AudioWorkletNode(context, 'recorder')
  let samples = 0
  node.port.onmessage = e => {
    if (!recording) return
    blocks.push(e.data)
    const seconds = (samples += e.data.length) / context.sampleRate
    label(`Stop (${clock(seconds)})`)
    if (seconds > +limits.seconds - .5) recording()
  }
  context.createMediaStreamSource(stream).connect(node).connect(context.destination)
}

// --- events

function go(address, state = null) {
  history.pushState(state, '', address)
  run({focus: !!state || !new URL(location).searchParams.has('q')})
}

$('ask').addEventListener('submit', e => {
  e.preventDefault()
  go(`/?${new URLSearchParams({q: $('q').value.trim()})}`)
})
document.addEventListener('click', e => { // links to queries do not load the page again
  const link = e.target.closest?.('a[href^="/?"]')
  if (!link || e.ctrlKey || e.metaKey || e.shiftKey || e.button) return
  e.preventDefault()
  if (link.id === 'more') {
    history.replaceState(history.state, '', link.href)
    return run({keep: true})
  }
  go(link.href)
})
$('file').addEventListener('change', e => {
  const [file] = e.target.files
  if (file) take(file, file.name)
  e.target.value = ''
})
$('record').addEventListener('click', record)
for (const kind of ['dragover', 'drop', 'dragleave']) document.addEventListener(kind, e => {
  if (!e.dataTransfer?.types.includes('Files')) return
  e.preventDefault()
  $('own').classList.toggle('over', kind === 'dragover')
  if (kind === 'drop' && e.dataTransfer.files[0]) take(e.dataTransfer.files[0], e.dataTransfer.files[0].name)
})
addEventListener('popstate', () => run())
run()
