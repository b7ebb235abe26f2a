"Damaged and hostile files, images and labels that disagree, downloads that fail"
import gzip, hashlib, http.server, io, os, pickle, socket, struct, subprocess, sys, threading, tracemalloc, zipfile
from contextlib import contextmanager
import numpy as np, pooch, pytest
from hypothesis import example, given, settings, strategies as st, HealthCheck
from minibatch import files
from minibatch.files import *
from minibatch.datasets import get_data, get_test
from conftest import SHARED

MIB = 2**20

def idx(a): return struct.pack(f'>HBB{a.ndim}I', 0, 8, a.ndim, *a.shape) + a.tobytes()
def npz(a, **kw):
    f = io.BytesIO()
    np.savez_compressed(f, *([] if kw else [a]), **kw)
    return f.getvalue()
def read(reader, data, tmp_path, name='file'):
    (tmp_path/name).write_bytes(data)
    return reader(tmp_path/name)

x8,y8 = (t.numpy() for t in get_data('digits')[2:])
x8,y8 = (x8[:20].reshape(-1,28,28)*255).round().astype(np.uint8), y8[:20].astype(np.uint8)
floats = (x8.reshape(-1,784)/256).astype(np.float32), y8.astype(np.int64)

def test_checksums_are_those_of_the_published_files(shared):
    for name in ('mnist', 'kmnist'):
        for file,sha in files._sha256[name].items():
            if (shared/name/file).exists(): assert hashlib.sha256((shared/name/file).read_bytes()).hexdigest()==sha

# ---- damaged files ----

def formats():
    pkl = pickle.dumps((floats,)*3, protocol=4)
    all = [(read_idx, idx(x8)), (read_idx, idx(y8)), (read_npz, npz(x8)), (read_npz, npz(y8)), (read_pickle, pkl)]
    if (SHARED/'mnist').is_dir():     # the real ones, as far as they are small enough to be read thousands of times
        all += [(read_idx, gzip.decompress((SHARED/'mnist'/'t10k-labels-idx1-ubyte.gz').read_bytes())),
                  (read_npz, (SHARED/'kmnist'/'kmnist-test-labels.npz').read_bytes())]
    return [(r,d) for r,b in all for d in (b, gzip.compress(b))]

FORMATS = formats()
edit = st.tuples(st.sampled_from('flip cut insert delete repeat'.split()), st.floats(0,1), st.binary(min_size=1, max_size=8))

def mutate(data, edits):
    for kind,where,b in edits:
        # half of the edits go to the first 300 bytes, where the headers are
        i = int(where*2*min(300, len(data))) if where<0.5 else int((where-0.5)*2*len(data))
        if   kind=='flip':   data = data[:i] + bytes(x^y for x,y in zip(data[i:i+len(b)], b)) + data[i+len(b):]
        elif kind=='cut':    data = data[:i]
        elif kind=='insert': data = data[:i] + b + data[i:]
        elif kind=='delete': data = data[:i] + data[i+len(b):]
        elif kind=='repeat': data = data + data[i:]
    return data

def plainly(reader, data):
    "What the undamaged parts of Python and numpy make of `data`, to compare with"
    if data[:2]==b'\x1f\x8b': data = gzip.decompress(data)
    if reader is read_npz: return np.load(io.BytesIO(zipfile.ZipFile(io.BytesIO(data)).read('arr_0.npy')), allow_pickle=False)
    return np.frombuffer(data, np.uint8, offset=4+4*data[3]).reshape(struct.unpack(f'>{data[3]}I', data[4:4+4*data[3]]))

@settings(max_examples=2500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.sampled_from(range(len(FORMATS))), st.lists(edit, min_size=1, max_size=4))
def test_mutated_files_are_read_right_or_refused(tmp_path, which, edits):
    reader, data = FORMATS[which]
    data = mutate(data, edits)
    tracemalloc.start()
    try:
        try: a = read(reader, data, tmp_path)
        except DatasetError as e: assert 'file' in str(e) and ('Replace' in str(e))
        else:
            if reader is read_pickle: assert all(isinstance(o, np.ndarray) for pair in a for o in pair)
            else: assert np.array_equal(a, plainly(reader, data))
        assert tracemalloc.get_traced_memory()[1] < 8*MIB
    finally: tracemalloc.stop()

def corrupt_zip(b): return b[:60] + bytes(8) + b[68:]
def npy_npz(header, body=b''):
    f = io.BytesIO()
    h = header.encode() + b'\n'
    with zipfile.ZipFile(f, 'w') as z: z.writestr('arr_0.npy', b'\x93NUMPY\1\0' + struct.pack('<H', len(h)) + h + body)
    return f.getvalue()

def other_npz(method):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w', method) as z: z.writestr('arr_0.npy', bytes(20*MIB))
    return f.getvalue()
def long_zip(n):
    f = io.BytesIO()
    with zipfile.ZipFile(f, 'w') as z:
        for i in range(n): z.writestr(f'file {i}', b'')
    return f.getvalue()

BAD = {
    'wrong magic':       (read_idx, b'\0\0\7\1' + struct.pack('>I', 3) + b'abc', 'begins with'),
    'no dimensions':     (read_idx, b'\0\0\x08\0', 'begins with'),
    'too many':          (read_idx, b'\0\0\x08\x05' + struct.pack('>5I', 1,1,1,1,1) + b'a', 'begins with'),
    'html':              (read_idx, b'<!DOCTYPE html><html>404</html>', 'begins with'),
    'empty':             (read_idx, b'', 'begins with'),
    'header cut':        (read_idx, idx(x8)[:9], 'unpack'),
    'cut':               (read_idx, idx(x8)[:-1], 'size 15679'),
    'trailing':          (read_idx, idx(x8)+b'x', 'size 15681'),
    'gzip cut':          (read_idx, gzip.compress(idx(x8))[:-20], 'EOFError'),
    'gzip broken':       (read_idx, gzip.compress(idx(x8))[:200]+b'xxxx'+gzip.compress(idx(x8))[204:], 'rror'),
    'gzip trailing':     (read_idx, gzip.compress(idx(x8))+b'xxxx', 'BadGzipFile'),
    'huge promise':      (read_idx, struct.pack('>HBB3I', 0, 8, 3, 2**31, 28, 28), 'size 0'),
    'overflowing':       (read_idx, struct.pack('>HBB4I', 0, 8, 4, *[2**32-1]*4), 'size 0'),
    '200 MB promise':    (read_idx, struct.pack('>HBB1I', 0, 8, 1, 200_000_000) + b'abc', 'size 3'),
    'gzip bomb':         (read_idx, gzip.compress(idx(y8) + bytes(300*MIB)), 'more than any'),
    'not a zip file':         (read_npz, idx(x8), 'not a zip file'),
    'zip cut':           (read_npz, npz(x8)[:-30], 'zip'),
    'zip broken':        (read_npz, corrupt_zip(npz(x8)), ''),
    'no arr_0':          (read_npz, npz(x8, images=x8), 'arr_0'),
    'objects':           (read_npz, npz(np.array([print, 1], dtype=object)), 'Object'),
    'strings':           (read_npz, npz(np.array(['a', 'b'])), 'not numbers'),
    'npy huge promise':  (read_npz, npy_npz("{'descr': '|u1', 'fortran_order': False, 'shape': (100000000000,)}", b'abc'), ''),
    'npy negative':      (read_npz, npy_npz("{'descr': '|u1', 'fortran_order': False, 'shape': (-1,)}", b'abc'), ''),
    'npy expression':    (read_npz, npy_npz("{'descr': '|u1', 'fortran_order': False, 'shape': (print(1),)}", b'abc'), 'malformed'),
    'zip bomb':          (read_npz, npz(np.zeros(300*MIB, np.uint8)), 'more than any'),
    'gzipped zip bomb':  (read_npz, gzip.compress(b'PK' + bytes(300*MIB)), 'more than any'),
    'bzip2 bomb':        (read_npz, other_npz(zipfile.ZIP_BZIP2), ''),
    'lzma bomb':         (read_npz, other_npz(zipfile.ZIP_LZMA), ''),
    'long directory':    (read_npz, long_zip(5000), 'a few parts'),
    'pickle cut':        (read_pickle, pickle.dumps((floats,)*3, protocol=2)[:-30], ''),
    'pickle trailing':   (read_pickle, pickle.dumps((floats,)*3, protocol=4)+b'.', 'goes on'),
    'pickled number':    (read_pickle, pickle.dumps(1), 'pairs of arrays'),
    'pickled nothing':   (read_pickle, pickle.dumps(((),)), 'pairs of arrays'),
    'pickled objects':   (read_pickle, pickle.dumps(((np.array([{}], dtype=object),)*2,)), ''),
}

@pytest.mark.parametrize('case', BAD)
@pytest.mark.parametrize('name', ['plain', 'packed.gz'])
def test_bad_files(tmp_path, case, name):
    reader, data, why = BAD[case]
    if name=='packed.gz' and data[:2]!=b'\x1f\x8b': data = gzip.compress(data)
    if 'bomb' in case: limit = 320*MIB               # it is unpacked until the limit is passed
    elif case=='npy huge promise': limit = 2**40     # numpy asks for the promised memory, and does not touch it
    else: limit = 4*MIB + 4*len(BAD[case][1])
    tracemalloc.start()
    with pytest.raises(DatasetError, match=name) as e: read(reader, data, tmp_path, name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert why in str(e.value) and 'Replace' in str(e.value)
    assert peak<limit

def test_missing_and_unreadable(tmp_path):
    for reader in (read_idx, read_npz, read_pickle):
        with pytest.raises(DatasetError, match='nowhere.* no such file'): reader(tmp_path/'nowhere')
        with pytest.raises(DatasetError, match='no such file'): reader(tmp_path)

def test_a_pipe_is_no_file(tmp_path):
    os.mkfifo(tmp_path/'pipe')
    with pytest.raises(DatasetError, match='no such file'): read_idx(tmp_path/'pipe')     # and does not wait for a writer

# ---- hostile pickles ----

def hostile(canary):
    "Programs that, in Python's own unpickler, make the file `canary` (`runs=True`), exhaust memory, or crash"
    code = f"open({str(canary)!r},'w').close()"
    s = code.encode()
    class Reduce:
        def __reduce__(self): return exec, (code,)
    class Nested:
        def __reduce__(self): return tuple, ([Reduce(), Reduce()],)
    class InArray:
        def __reduce__(self): return np.frombuffer, (b'abcd', Reduce())
    short = lambda t: b'\x8c' + bytes([len(t)]) + t.encode()
    runs = {f'reduce {p}': pickle.dumps(Reduce(), protocol=p) for p in range(6)}
    runs |= {f'nested {p}': pickle.dumps((floats, Nested()), protocol=p) for p in (2,4,5)}
    runs |= {
        'inst':  b"(S" + repr(code).encode() + b"\ni__builtin__\nexec\n.",
        'obj':   b"(c__builtin__\nexec\nS" + repr(code).encode() + b"\no.",
        'stacked global': b'\x80\x04' + short('builtins') + short('exec') + b'\x93' + b'X' + struct.pack('<I', len(s)) + s + b'\x85R.',
        'global by memo': b'\x80\x04' + short('exec') + b'\x94' + short('builtins') + b'\x94' + b'0' + b'0' + b'h\1h\0\x93'
                          b'X' + struct.pack('<I', len(s)) + s + b'\x85R.',
        'inside an array': pickle.dumps(InArray(), protocol=4),
    }
    frombuffer, f4 = b'cnumpy._core.numeric\n_frombuffer\n', b'cnumpy\ndtype\nU\2f4\x85R'
    def array(raw, shape): return b'\x80\x02' + frombuffer + b'(' + raw + f4 + shape + b'U\1CtR.'
    def laughs(i): return b'N' + b''.join(b'q%ch%c\x86' % (j,j) for j in range(i, i+60))     # sixty tuples deep, 2^60 wide
    rest = {
        'attributes of a name':  b'\x80\x04' + short('numpy._core.multiarray') + short('_reconstruct.__globals__') + b'\x93.',
        'set state of a class':  b'\x80\x02cnumpy\ndtype\n(K\x01K\x02tb.',
        'set state of a function': b'\x80\x02cnumpy.core.multiarray\n_reconstruct\n}U\x08__code__K\x01sb.',
        'slots of a function':   b'\x80\x02cnumpy.core.multiarray\n_reconstruct\nN}U\x08__code__K\x01s\x86b.',
        'call ndarray':          b'\x80\x02cnumpy\nndarray\n(J\x00\x00\x00\x7ftR.',
        'reconstruct 1 TB':      b'\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n\x8a\x06\0\0\0\0\0\1\x85U\1btR.',
        'memo index 4 billion':  b'\x80\x02Nr\xff\xff\xff\xff.',
        'memo index 16 million': b'\x80\x02Nr' + struct.pack('<I', 2**24) + b'.',
        'a string of 2 GB':      b'\x80\x02T\xff\xff\xff\x7fabc.',
        'bytes of 1 TB':         b'\x80\x05\x96' + struct.pack('<Q', 2**40) + b'abc.',
        'a frame of 1 TB':       b'\x80\x04\x95' + struct.pack('<Q', 2**40) + b'N.',
        'a deep tuple as a key': b'\x80\x02}N' + b'\x85'*500_000 + b'Ns.',
        'a million instructions': b'\x80\x02' + b'N'*1_000_000 + b'.',
        'billion laughs':        b'\x80\x02' + laughs(0) + b'.',
        'a persistent id':       b'\x80\x02K\x01Q.',
        'an extension':          b'\x80\x02\x82\x01.',
        'pop from nothing':      b'\x80\x020000.',
        'get from an empty memo': b'\x80\x02h\x05.',
        'array of objects':      b'\x80\x02' + b'cnumpy\ndtype\nU\x02O8K\0K\1\x87R.',
        'a number as a type':   b'\x80\x02cnumpy\ndtype\n(J\xff\xff\xff\x7ftR.',
        'a long name':          b'\x80\x04X' + struct.pack('<I', 5*MIB) + b'a'*5*MIB + b'h\0\x93.',
        'a negative shape':     pickle.dumps((floats,)*3, protocol=4).replace(b'M\x10\x03\x86', b'J\xff\xff\xff\xff\x86'),
        'laughs as a size':      array(b'U\4abcd', laughs(0)+laughs(60)+b'\x86'),
        'laughs as a type':      b'\x80\x02cnumpy\ndtype\n' + laughs(0) + b'\x85R.',
        'laughs as a key':       b'\x80\x02}' + laughs(0) + b'Ns.',
        'a number as bytes':     array(b'J\xff\xff\xff\x7f', b'K\1\x85'),
        'one string, a thousand arrays': b'\x80\x02' + b'T' + struct.pack('<i', MIB) + bytes(MIB) + b'q\0' + f4 + b'q\1'
            + b'J' + struct.pack('<i', MIB//4) + b'\x85q\2' + frombuffer + b'q\3' + b'(' + b'h\3(h\0h\1h\2U\1CtR'*1000 + b't.',
        'no stop':               b'\x80\x02N',
    }
    return runs, rest

RUNS, REST = hostile('canary')

@pytest.mark.parametrize('case', RUNS)
def test_hostile_pickles_run_in_pickle_and_not_in_ours(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for data in (RUNS[case], gzip.compress(RUNS[case])):
        with pytest.raises(DatasetError): read(read_pickle, data, tmp_path)
        assert not (tmp_path/'canary').exists()
    try: pickle.loads(RUNS[case])     # and it is not the test that is harmless
    except Exception: pass
    assert (tmp_path/'canary').exists()

@pytest.mark.parametrize('case', REST)
def test_hostile_pickles_are_refused(case, tmp_path):
    tracemalloc.start()
    with pytest.raises(DatasetError) as e: read(read_pickle, REST[case], tmp_path)
    assert len(str(e.value))<1000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8*MIB + 4*len(REST[case])

@settings(max_examples=500, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=60))
def test_random_pickle_programs(tmp_path, program):
    with pytest.raises(DatasetError): read(read_pickle, b'\x80\x04cnumpy.core.multiarray\n_reconstruct\n' + program + b'.', tmp_path)

# ---- images and labels that do not belong together ----

def put(folder, x, y, part='train'):
    t = dict(train='train', test='t10k')[part]
    folder.mkdir(parents=True, exist_ok=True)
    (folder/f'{t}-images-idx3-ubyte').write_bytes(idx(x))
    (folder/f'{t}-labels-idx1-ubyte.gz').write_bytes(gzip.compress(idx(y)))

@pytest.mark.parametrize('x,y,why', [(x8, y8[:-1], '19 labels for 20 images'), (x8[:,:27], y8, '28 by 28'), (x8, x8, 'one whole number'),
                                     (y8, y8, '28 by 28'), (x8[:0], y8[:0], '0 labels')])
def test_pairs_that_disagree(bare, tmp_path, x, y, why):
    put(tmp_path/'mnist', x, y)
    with pytest.raises(DatasetError, match=why) as e: get_data('mnist', tmp_path)
    assert 'ubyte' in str(e.value)

@pytest.mark.parametrize('x,y,why', [(floats[0], floats[1]+300, 'outside'), (floats[0], -floats[1], 'outside'), (floats[0], floats[0], 'one whole number'),
    (floats[0]*3, floats[1], 'pixels go from'), (floats[0]*np.nan, floats[1], 'pixels go from'), (floats[0], floats[1][:5], '5 labels for 20'),
    (floats[0][:0], floats[1][:0], '0 labels'), (np.float32(3), floats[1], '28 by 28'), (floats[0], np.int64(3), 'one whole number')])
def test_pickles_that_disagree(bare, tmp_path, x, y, why):
    (tmp_path/'mnist.pkl').write_bytes(pickle.dumps(((np.asarray(x), np.asarray(y)),)*3, protocol=4))
    with pytest.raises(DatasetError, match=why): get_data('mnist', tmp_path)

def test_pickle_whose_pairs_disagree_and_cancel_out(bare, tmp_path):
    x,y = floats
    (tmp_path/'mnist.pkl').write_bytes(pickle.dumps(((x[:15],y), (x,y[:15]), (x,y)), protocol=4))
    with pytest.raises(DatasetError, match='20 labels for 15'): get_data('mnist', tmp_path)

def test_images_in_fortran_order(bare, tmp_path):
    np.savez(tmp_path/'kmnist-test-imgs.npz', np.asfortranarray(x8))
    np.savez(tmp_path/'kmnist-test-labels.npz', y8)
    x,_ = get_test('kmnist', tmp_path)
    assert np.array_equal((x*255).round().numpy(), x8.reshape(-1,784))

def test_pickle_with_too_few_pairs(bare, tmp_path):
    (tmp_path/'mnist.pkl').write_bytes(pickle.dumps((floats,)*2, protocol=4))
    with pytest.raises(DatasetError, match='three pairs'): get_data('mnist', tmp_path)

def test_big_endian_labels_and_pixels_of_a_255th(bare, tmp_path):
    x,y = (x8.reshape(-1,784)/255).astype(np.float32), y8.astype('>i4')
    (tmp_path/'mnist.pkl').write_bytes(pickle.dumps(((x,y),)*3, protocol=4))
    xt,yt,*_ = get_data('mnist', tmp_path)
    assert np.array_equal(xt.numpy()[:5], x[:5]) and np.array_equal(yt.numpy()[:5], y8[:5])

def test_one_alphabet_is_not_taken_for_the_other(bare, tmp_path):
    for name,other in (('mnist','kmnist'), ('kmnist','mnist')):
        for part,labels in files._first_labels[other].items():
            put(tmp_path/other/part, x8[:16], np.array(list(labels)).astype(np.uint8), part)
            with pytest.raises(DatasetError, match=f'belongs to {other}'): (get_test if part=='test' else get_data)(name, tmp_path/other/part)

def test_first_labels_are_those_of_the_published_files(shared):
    for name in ('mnist', 'kmnist'):
        for part,labels in files._first_labels[name].items():
            y = read_idx(shared/name/f'{files._idx_names[part][1]}.gz')
            assert ''.join(map(str, y[:16]))==labels

# ---- downloads ----

class Handler(http.server.BaseHTTPRequestHandler):
    "Serves `self.server.files`, well or in one of the ways in which servers fail"
    def log_message(self, *args): pass
    def do_HEAD(self): self.do_GET()
    def do_GET(self):
        data, how = self.server.files.get(self.path.split('/')[-1], b''), self.server.how
        if how=='redirect' and not self.path.endswith('.html'):
            self.send_response(302); self.send_header('Location', '/login.html'); self.end_headers(); return
        status = how if isinstance(how, int) else 200
        if status!=200 or how=='redirect': data = b'<!DOCTYPE html><html>Sorry</html>'
        self.send_response(status); self.send_header('Content-Length', str(len(data))); self.end_headers()
        if self.command=='HEAD': return
        if how=='wrong': data = bytes([data[0]^1]) + data[1:]
        if how=='cut': data = data[:len(data)//2]
        self.wfile.write(data)
        if self.command=='GET': self.server.served.append(self.path)

@contextmanager
def serving(published, how=200):
    s = http.server.ThreadingHTTPServer(('localhost', 0), Handler)
    s.files, s.how, s.served = published, how, []
    threading.Thread(target=s.serve_forever, daemon=True).start()
    try: yield f'http://localhost:{s.server_port}/', s
    finally: s.shutdown(); s.server_close()

@pytest.fixture
def published(monkeypatch):
    "The published test published where they are at hand, else the digits in their form"
    names = [f'{n}.gz' for n in files._idx_names['test']]
    if (SHARED/'mnist').is_dir(): return {n: (SHARED/'mnist'/n).read_bytes() for n in names}
    published = dict(zip(names, [gzip.compress(idx(x8)), gzip.compress(idx(y8))]))
    monkeypatch.setitem(files._sha256, 'mnist', {n: hashlib.sha256(b).hexdigest() for n,b in published.items()})
    return published

def check(xy, published):
    x,y = xy
    raw = gzip.decompress(published['t10k-labels-idx1-ubyte.gz'])
    assert y.tolist()==list(raw[8:]) and x.shape==(len(y),784)

FAULTS = [404, 503, 'refused', 'cut', 'wrong', 'redirect']

@contextmanager
def faulty(published, fault):
    if fault=='refused':
        with socket.socket() as s:     # a port that was free a moment ago
            s.bind(('localhost', 0)); port = s.getsockname()[1]
        yield f'http://localhost:{port}/'
    else:
        with serving(published, fault) as (url,_): yield url

@pytest.mark.parametrize('fault', FAULTS)
def test_a_mirror_that_fails(bare, published, monkeypatch, fault):
    with faulty(published, fault) as url:
        monkeypatch.setitem(files._urls, 'mnist', [url])
        with pytest.raises(DatasetError) as e: get_test('mnist')
        assert url in str(e.value) and "'digits'" in str(e.value) and str(bare) in str(e.value) and 't10k-images' in str(e.value)
        if isinstance(fault, int): assert str(fault) in str(e.value)
        assert not [p for p in bare.rglob('*') if p.is_file()]              # nothing half-written, under any name
        with serving(published) as (good,server):
            monkeypatch.setitem(files._urls, 'mnist', [url, good])
            check(get_test('mnist'), published)
            n = len(server.served)
            check(get_test('mnist'), published)                                # the second time from the cache
            assert len(server.served)==n
    assert sorted(p.name for p in bare.rglob('*') if p.is_file())==sorted(published)

def test_a_server_that_never_answers(bare, published, monkeypatch):
    get = pooch.HTTPDownloader
    monkeypatch.setattr('pooch.HTTPDownloader', lambda timeout: get(timeout=tuple(t/20 for t in timeout)))
    with socket.socket() as s:
        s.bind(('localhost', 0)); s.listen()
        monkeypatch.setitem(files._urls, 'mnist', [f'http://localhost:{s.getsockname()[1]}/'])
        with pytest.raises(DatasetError, match='ReadTimeout'): get_test('mnist')

def test_two_processes_at_the_same_time(bare, published):
    with serving(published) as (url,_):
        code = f'''from minibatch import datasets, files
files._urls['mnist'], files._sha256['mnist'] = [{url!r}], {files._sha256['mnist']!r}
print(datasets.get_test('mnist')[1].sum().item())'''
        ps = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) for _ in range(2)]
        outs = [p.communicate()[0].strip() for p in ps]
    want = sum(gzip.decompress(published['t10k-labels-idx1-ubyte.gz'])[8:])
    assert outs==[str(want)]*2
    assert sorted(p.name for p in bare.rglob('*') if p.is_file())==sorted(published)

def test_a_damaged_file_in_the_cache_says_so(bare, published, monkeypatch):
    (bare/'mnist').mkdir(parents=True)
    for n,b in published.items(): (bare/'mnist'/n).write_bytes(b[:-30])
    with pytest.raises(DatasetError, match='delete it to have it downloaded again'): get_test('mnist')
