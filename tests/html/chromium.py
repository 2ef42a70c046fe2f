"""A headless Chromium, spoken to by the DevTools protocol over two pipes: nothing but Python's own library."""

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import tempfile
import time


def find_chromium():
    for name in ('chromium', 'chromium-browser', 'google-chrome'):
        path = shutil.which(name)
        if path:
            return path
    return None


class Page:
    """One tab. What the page does wrong is collected in `problems`, what it asks for in `requests`."""

    def __init__(self, chromium, downloads):
        self.profile = tempfile.mkdtemp(prefix='orrery_page_')
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        # The browser reads descriptor 3 and writes descriptor 4.
        command = ('exec 3<&%d 4>&%d; exec "$0" "$@"' % (to_browser, from_browser))
        self.process = subprocess.Popen(
            ['/bin/sh', '-c', command, chromium, '--headless=new', '--remote-debugging-pipe', '--no-sandbox',
             '--disable-gpu', '--disable-dev-shm-usage', '--no-first-run', '--disable-extensions',
             '--disable-background-networking', '--disable-component-update', '--hide-scrollbars',
             '--force-color-profile=srgb', '--user-data-dir=' + self.profile, 'about:blank'],
            pass_fds=(to_browser, from_browser), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True)
        os.close(to_browser)
        os.close(from_browser)
        self._buffer = b''
        self._next = 0
        self._session = None
        self.problems = []
        self.requests = []
        target = next(t for t in self.call('Target.getTargets')['targetInfos'] if t['type'] == 'page')
        self._session = self.call('Target.attachToTarget', targetId=target['targetId'], flatten=True)['sessionId']
        for domain in ('Page', 'Runtime', 'Log', 'Network', 'DOM', 'Accessibility'):
            self.call(domain + '.enable')
        session, self._session = self._session, None
        self.call('Browser.setDownloadBehavior', behavior='allow', downloadPath=downloads)
        self._session = session
        # Also violations that the console does not show.
        self.call('Page.addScriptToEvaluateOnNewDocument',
                  source='window.violations = []; addEventListener("securitypolicyviolation", '
                         '(e) => violations.push(e.violatedDirective + " " + e.blockedURI));')

    def close(self):
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.process.wait()
        os.close(self._read)
        os.close(self._write)
        shutil.rmtree(self.profile, ignore_errors=True)

    def _receive(self, deadline):
        while b'\0' not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._read], [], [], left)[0]:
                return None
            chunk = os.read(self._read, 1 << 20)
            if not chunk:
                raise RuntimeError('the browser has ended')
            self._buffer += chunk
        message, self._buffer = self._buffer.split(b'\0', 1)
        return json.loads(message)

    def _note(self, message):
        method, params = message.get('method'), message.get('params', {})
        if method == 'Runtime.exceptionThrown':
            details = params['exceptionDetails']
            self.problems.append('exception: ' + details.get('exception', {}).get('description', details['text']))
        elif method == 'Log.entryAdded' and params['entry']['level'] in ('error', 'warning'):
            self.problems.append('log: ' + params['entry']['text'])
        elif method == 'Runtime.consoleAPICalled' and params['type'] in ('error', 'warning', 'assert'):
            self.problems.append('console: ' + str(params['args']))
        elif method == 'Network.requestWillBeSent':
            self.requests.append(params['request']['url'])

    def call(self, method, **params):
        self._next += 1
        message = {'id': self._next, 'method': method, 'params': params}
        if self._session:
            message['sessionId'] = self._session
        os.write(self._write, json.dumps(message).encode() + b'\0')
        deadline = time.monotonic() + 120
        while True:
            answer = self._receive(deadline)
            if answer is None:
                raise RuntimeError(method + ': no answer')
            if answer.get('id') == self._next:
                if 'error' in answer:
                    raise RuntimeError(method + ': ' + answer['error']['message'])
                return answer['result']
            self._note(answer)

    def evaluate(self, expression):
        result = self.call('Runtime.evaluate', expression=expression, returnByValue=True, awaitPromise=True)
        if 'exceptionDetails' in result:
            details = result['exceptionDetails']
            raise RuntimeError(expression + ': ' + details.get('exception', {}).get('description', details['text']))
        return result['result'].get('value')

    def wait(self, expression, seconds=60):
        deadline = time.monotonic() + seconds
        while not self.evaluate(expression):
            if time.monotonic() > deadline or any(text.startswith('exception') for text in self.problems):
                raise RuntimeError('waited in vain for ' + expression)
            time.sleep(0.05)

    def open(self, path, width=1280, height=900):
        self.call('Emulation.setDeviceMetricsOverride', width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call('Page.navigate', url='file://' + os.path.abspath(path))
        self.wait('document.readyState === "complete"')

    def media(self, kind='screen', scheme='light'):
        self.call('Emulation.setEmulatedMedia', media=kind, features=[{'name': 'prefers-color-scheme', 'value': scheme}])

    def key(self, key):
        codes = {'Enter': 13, 'Home': 36, 'ArrowLeft': 37, 'ArrowUp': 38, 'ArrowRight': 39, 'ArrowDown': 40, 'Tab': 9, 'Escape': 27}
        text = {} if key in codes and key != 'Enter' else {'text': '\r' if key == 'Enter' else key}
        self.call('Input.dispatchKeyEvent', type='keyDown', key=key, windowsVirtualKeyCode=codes.get(key, ord(key[0])), **text)
        self.call('Input.dispatchKeyEvent', type='keyUp', key=key, windowsVirtualKeyCode=codes.get(key, ord(key[0])))

    def mouse(self, kind, x, y, **more):
        self.call('Input.dispatchMouseEvent', type=kind, x=x, y=y, **more)

    def screenshot(self, path, whole=True):
        picture = self.call('Page.captureScreenshot', format='png', captureBeyondViewport=whole)
        with open(path, 'wb') as file:
            file.write(base64.b64decode(picture['data']))

    def pdf(self, path):
        with open(path, 'wb') as file:
            file.write(base64.b64decode(self.call('Page.printToPDF', preferCSSPageSize=True, printBackground=True)['data']))
