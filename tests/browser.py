"A headless Chromium for the tests, controlled by the DevTools protocol."
import base64, contextlib, json, subprocess, time, urllib.request

import pytest

from command import chromium

class Tab:
    "A page in a browser."
    def __init__(self, port):
        import websocket
        with urllib.request.urlopen(f'http://127.0.0.1:{port}/json', timeout=10) as f: tabs = json.load(f)
        address = next(t['webSocketDebuggerUrl'] for t in tabs if t['type'] == 'page')
        self.socket, self.n = websocket.create_connection(address, timeout=30, suppress_origin=True), 0
        self.asked, self.problems = [], []  # addresses of requests; exceptions and what the policy refused

    def send(self, method, **params):
        self.n += 1
        self.socket.send(json.dumps({'id': self.n, 'method': method, 'params': params}))
        while (answer := json.loads(self.socket.recv())).get('id') != self.n: self.note(answer)
        return answer['result']

    def note(self, event):
        params = event.get('params', {})
        if event.get('method') == 'Network.requestWillBeSent': self.asked.append(params['request']['url'])
        if event.get('method') == 'Runtime.exceptionThrown': self.problems.append(params['exceptionDetails'])
        if event.get('method') == 'Log.entryAdded' and params['entry']['source'] == 'security': self.problems.append(params['entry']['text'])

    def value(self, script, **options):
        return self.send('Runtime.evaluate', expression=script, returnByValue=True, **options)['result'].get('value')

    def wait(self, script, seconds=30):
        for _ in range(seconds * 5):
            if (found := self.value(script)): return found
            time.sleep(.2)
        raise AssertionError(f'not within {seconds} s: {script}')

    def open(self, address):
        self.send('Page.navigate', url=address)
        self.wait(f'location.href === {json.dumps(address)} && document.readyState === "complete"')

    def keys(self, text):
        "Type a text; a line break is the key Enter."
        for c in text:
            key = dict(key='Enter', code='Enter', text='\r', windowsVirtualKeyCode=13) if c == '\n' else dict(key=c, text=c)
            for kind in ('keyDown', 'keyUp'): self.send('Input.dispatchKeyEvent', type=kind, **key)

    def size(self, width, height, dark=False):
        "Size of the window in pixels, and the colour scheme."
        self.send('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=width < 600)
        self.send('Emulation.setEmulatedMedia', features=[dict(name='prefers-color-scheme', value='dark' if dark else 'light')])

    def picture(self, path, whole=False):
        path.write_bytes(base64.b64decode(self.send('Page.captureScreenshot', captureBeyondViewport=whole)['data']))

@contextlib.contextmanager
def browser(profile, # empty folder
            *options):
    "A `Tab` of a new Chromium; the test is skipped without one."
    pytest.importorskip('websocket')
    process = subprocess.Popen([*chromium(profile), '--window-size=1400,900', '--remote-debugging-port=0', *options, 'about:blank'],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        port = profile/'DevToolsActivePort'
        for _ in range(300):
            if port.exists() and port.read_text().split(): break # it is empty for a moment
            time.sleep(.2)
        yield Tab(port.read_text().split()[0])
    finally: process.terminate(); process.wait(20)
