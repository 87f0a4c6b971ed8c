"""The network half of `cargo xtask setup`: pip's own index, certificates and proxy, without pip's
downloader, which cannot go on where a broken download stopped and, before pip 24, downloads whole
wheels even for a dry run.

    locate PROJECT FILE   prints the URL of FILE, found as pip would find it
    get URL OFFSET        prints START on a line, then the bytes of URL from START on
    member ARCHIVE NAME   prints the file NAME of a wheel or of a source archive
"""

import ast
import base64
import html.parser
import os
import shutil
import ssl
import subprocess
import sys
import tarfile
import urllib.error
import urllib.parse
import urllib.request
import zipfile

STALLED_AFTER_SECONDS = 30


def pip_options():
    """pip's effective options, from its files and environment; a later section wins, as in pip."""
    sections = {"global": {}, "install": {}, "download": {}, ":env:": {}}
    listing = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    for line in listing.splitlines():
        key, equals, value = line.partition("=")
        section, _, option = key.partition(".")
        if equals and section in sections:
            sections[section][option] = ast.literal_eval(value)
    merged = {}
    for section in sections.values():
        merged.update(section)
    return merged


def certificates(options):
    """What the system trusts, and what pip and requests were told to trust."""
    context = ssl.create_default_context()
    told = [options.get("cert"), os.environ.get("REQUESTS_CA_BUNDLE"), os.environ.get("CURL_CA_BUNDLE")]
    try:
        from pip._vendor import certifi

        told.append(certifi.where())
    except (ImportError, OSError):
        pass
    for bundle in told:
        if bundle and os.path.isfile(bundle):
            context.load_verify_locations(cafile=bundle)
    return context


def opener(options, url=""):
    handlers = [urllib.request.HTTPSHandler(context=certificates(options))]
    if urllib.parse.urlsplit(url).hostname == "127.0.0.1":
        # No proxy can reach this machine's loopback, which is where the tests' server is.
        handlers.append(urllib.request.ProxyHandler({}))
    elif options.get("proxy"):
        handlers.append(urllib.request.ProxyHandler({"http": options["proxy"], "https": options["proxy"]}))
    return urllib.request.build_opener(*handlers)


def request(url, headers):
    """A request for a URL that may hold a user and a password, as an index URL in pip's settings may."""
    parts = urllib.parse.urlsplit(url)
    if parts.username is not None:
        user = urllib.parse.unquote(parts.username) + ":" + urllib.parse.unquote(parts.password or "")
        headers["Authorization"] = "Basic " + base64.b64encode(user.encode()).decode()
        parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
    return urllib.request.Request(parts.geturl(), headers=headers)


class Links(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.hrefs = []

    def handle_starttag(self, tag, attrs):
        if tag == "a":
            self.hrefs += [value for name, value in attrs if name == "href" and value]


def on_page(page, file, browser):
    """The link to `file` on an index page, with the page's own credentials where the host is the same."""
    headers = {"Accept": "application/vnd.pypi.simple.v1+html, text/html;q=0.9"}
    with browser.open(request(page, headers), timeout=STALLED_AFTER_SECONDS) as reply:
        links = Links()
        links.feed(reply.read().decode("utf-8", "replace"))
        base = reply.geturl()
    for href in links.hrefs:
        parts = urllib.parse.urlsplit(urllib.parse.urljoin(base, href))
        if urllib.parse.unquote(parts.path).rpartition("/")[2] == file:
            asked = urllib.parse.urlsplit(page)
            if asked.username is not None and asked.hostname == parts.hostname:
                parts = parts._replace(netloc=asked.netloc)
            return parts._replace(fragment="").geturl()
    return None


def locate(project, file, options):
    def words(option):
        return str(options.get(option) or "").split()

    pages = words("find-links")
    if str(options.get("no-index", "")).lower() not in ("1", "true", "yes", "on"):
        from pip._internal.models.index import PyPI

        indexes = [options.get("index-url") or PyPI.simple_url] + words("extra-index-url")
        pages += [index.rstrip("/") + "/" + project + "/" for index in indexes]
    browser = opener(options)
    troubles = []
    for page in pages:
        if page.startswith("file://"):
            page = urllib.request.url2pathname(urllib.parse.urlsplit(page).path)
        if os.path.isdir(page):
            path = os.path.join(page, file)
            if os.path.isfile(path):
                return "file://" + urllib.request.pathname2url(os.path.abspath(path))
            continue
        try:
            found = on_page(page, file, browser)
        except (OSError, ValueError) as error:
            troubles.append(str(error))
            continue
        if found:
            return found
    sys.exit("none of pip's indexes has " + file + "".join("; " + trouble for trouble in troubles))


def get(url, offset, options):
    headers = {"Accept-Encoding": "identity", "User-Agent": "muster-xtask"}
    if offset:
        headers["Range"] = "bytes=%d-" % offset
    try:
        reply = opener(options, url).open(request(url, headers), timeout=STALLED_AFTER_SECONDS)
    except urllib.error.HTTPError as error:
        sys.exit("the server answered %d %s" % (error.code, error.reason))
    with reply:
        status = reply.status or 200
        start = 0
        if status == 206:
            start = int(reply.headers["Content-Range"].split()[1].partition("-")[0])
        out = sys.stdout.buffer
        out.write(b"%d\n" % start)
        out.flush()
        shutil.copyfileobj(reply, out, 1 << 18)


def member(archive, name):
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as opened, opened.open(name) as source:
            shutil.copyfileobj(source, sys.stdout.buffer, 1 << 18)
    else:
        with tarfile.open(archive) as opened:
            shutil.copyfileobj(opened.extractfile(name), sys.stdout.buffer, 1 << 18)


def main():
    mode, first, second = sys.argv[1:]
    try:
        if mode == "locate":
            print(locate(first, second, pip_options()))
        elif mode == "member":
            member(first, second)
        else:
            get(first, int(second), pip_options())
    except BrokenPipeError:
        # Whoever asked is gone, or has seen enough.
        os._exit(1)
    except (OSError, ValueError, KeyError) as error:
        sys.exit("%s: %s" % (type(error).__name__, error))


main()
