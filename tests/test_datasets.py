"The data sets as tensors: agreement with the published files, splits, names, and the digits in MNIST's place"
import gzip
from pathlib import Path
import numpy as np, pytest, torch
from minibatch import datasets, files
from minibatch.files import DatasetError
from minibatch.datasets import *

def test_mnist_from_idx_and_from_pickle_is_the_same(shared, tmp_path, bare):
    (tmp_path/'mnist.pkl.gz').symlink_to(shared/'mnist'/'mnist.pkl.gz')
    a, b = get_data('mnist', shared), get_data('mnist', tmp_path)
    assert [len(t) for t in a]==[50_000, 50_000, 10_000, 10_000]
    for t,u in zip((*a, *get_test('mnist', shared)), (*b, *get_test('mnist', tmp_path))): assert t.dtype==u.dtype and t.equal(u)
    raw = np.frombuffer(gzip.decompress((shared/'mnist'/'train-images-idx3-ubyte.gz').read_bytes()), np.uint8, offset=16).reshape(-1,784)
    assert np.array_equal((torch.cat(a[::2])*255).round().to(torch.uint8).numpy(), raw)

def test_kmnist_from_npz_and_from_idx_is_the_same(shared, tmp_path, bare):
    for f in ('t10k-images-idx3-ubyte.gz', 't10k-labels-idx1-ubyte.gz'): (tmp_path/f).symlink_to(shared/'kmnist'/f)
    for t,u in zip(get_test('kmnist', shared), get_test('kmnist', tmp_path)): assert t.equal(u)

@pytest.mark.parametrize('n_valid,sizes', [(None,(50_000,10_000)), (0,(60_000,10_000)), (1,(59_999,1))])
def test_n_valid(shared, n_valid, sizes):
    x,y,xv,yv = get_data('mnist', shared, n_valid=n_valid)
    assert (len(x), len(xv))==(len(y), len(yv))==sizes

def test_kmnist_subset_in_a_folder_of_its_own(shared, bare):
    x,y,xv,yv = get_data('kmnist', shared/'kmnist-8k')
    assert (len(x), len(xv))==(8000-8000//6, 8000//6)
    assert len(get_data('kmnist', shared/'kmnist-8k', n_valid=0)[2])==2000

def test_digits():
    x,y,xv,yv = get_data('digits')
    assert x.shape==(1500,784) and xv.shape==(297,784) and x.dtype==torch.float32 and y.dtype==torch.int64
    assert 0==x.min() and x.max()<=1
    both = torch.cat([x, xv]).view(-1,28,28)
    assert both[:,:4].sum()==both[:,-4:].sum()==both[:,:,:4].sum()==both[:,:,-4:].sum()==0    # the frame
    raw = np.load(Path(datasets.__file__).with_name('digits.npz'))
    assert torch.cat([y, yv]).bincount().tolist()==np.bincount(raw['y']).tolist()
    share = yv.bincount()/torch.cat([y, yv]).bincount()
    assert (share-297/1797).abs().max()<0.01                                                   # stratified
    assert all(torch.equal(a,b) for a,b in zip(get_data('digits'), get_data('digits')))

def test_names_and_folders_that_do_not_exist(bare, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="'mnist', 'kmnist', 'digits'"): get_data('minst')
    with pytest.raises(ValueError, match='minst'): dataset_classes('minst')
    with pytest.raises(DatasetError, match='nowhere.* not a folder'): get_data('mnist', tmp_path/'nowhere')
    monkeypatch.setenv('MINIBATCH_DATA', 'nowhere')
    with pytest.raises(DatasetError, match='MINIBATCH_DATA, is not a folder'): get_test('mnist')
    for n in (-1, 1500):
        with pytest.raises(ValueError, match='n_valid'): get_data('digits', n_valid=n)
    for n in (10.0, '5'):
        with pytest.raises(TypeError): get_data('digits', n_valid=n)

def test_without_a_name_the_digits_come_with_one_line(bare, monkeypatch, capfd):
    monkeypatch.setitem(files._urls, 'mnist', ['http://localhost:9/'])
    x,*_ = get_data()
    assert len(x)==1500
    out,err = capfd.readouterr()
    assert err=='' and out.count('\n')==1 and 'MNIST is not here' in out and '1,797 bundled digits' in out

def test_a_damaged_file_is_not_passed_over(bare, tmp_path):
    for n in files._idx_names['train']: (tmp_path/n).write_bytes(b'broken')
    with pytest.raises(DatasetError, match='begins with'): get_data(path=tmp_path)
    with pytest.raises(DatasetError, match='not a folder'): get_data(path=tmp_path/'nowhere')
