import assert from "node:assert/strict";
import { StatusError } from "../../../lib/error.ts";
import { type FsType, fsTypes } from "../../../lib/host/filesystem/fs_type.ts";
import { parseMkfsOptions } from "../../../lib/host/filesystem/mkfs_options.ts";

const goodOptions: readonly [FsType, string, readonly string[]][] = [
  ["ext4", "", []],
  ["ext4", "-m0", ["-m", "0"]],
  ["ext4", " -b  4096\t-E stride=16,stripe_width=64 ", ["-b", "4096", "-E", "stride=16,stripe_width=64"]],
  ["ext4", "-O ^has_journal,metadata_csum -i 8192", ["-O", "^has_journal,metadata_csum", "-i", "8192"]],
  ["xfs", "-i size=512 -l size=64m -m reflink=0", ["-i", "size=512", "-l", "size=64m", "-m", "reflink=0"]],
  ["btrfs", "-M -m single --csum xxhash", ["-M", "-m", "single", "--csum", "xxhash"]],
  ["btrfs", "--csum=sha256", ["--csum", "sha256"]],
  ["ext4", "-O +quota,-resize_inode -e remount-ro", ["-O", "+quota,-resize_inode", "-e", "remount-ro"]],
  ["xfs", "-m bigtime=0,inobtcount=0 -i nrext64=0", ["-m", "bigtime=0,inobtcount=0", "-i", "nrext64=0"]],
  ["btrfs", "-O ^no-holes,quota", ["-O", "^no-holes,quota"]],
];

for (const [fsType, text, args] of goodOptions) {
  Deno.test(`parseMkfsOptions takes "${text}" for ${fsType}`, () => {
    assert.deepEqual(parseMkfsOptions(fsType, text), args);
  });
}

const badOptions: readonly [FsType, string, RegExp][] = [
  ["ext4", "-F", /-F is not one of/],
  ["ext4", "-FF", /-F is not one of/],
  ["ext4", "-qF", /-q is not one of/],
  ["ext4", "-n", /-n is not one of/],
  ["ext4", "-S", /-S is not one of/],
  ["ext4", "-c", /-c is not one of/],
  ["ext4", "-l /etc/passwd", /-l is not one of/],
  ["ext4", "-d /etc", /-d is not one of/],
  ["ext4", "-U random", /-U is not one of/],
  ["ext4", "-M /var", /-M is not one of/],
  ["ext4", "/dev/sda", /"\/dev\/sda" belongs to no option/],
  ["ext4", "-m 0 100G", /"100G" belongs to no option/],
  ["ext4", "-m", /-m has no value/],
  ["ext4", "-m -F", /the value "-F" of -m/],
  ["ext4", "-m-F", /the value "-F" of -m/],
  ["ext4", "-J device=LABEL=x", /-J device is not allowed/],
  ["ext4", "-J size=4,device=x", /-J device is not allowed/],
  ["ext4", "-E offset=1048576", /-E offset is not allowed/],
  ["ext4", "-O journal_dev", /-O journal_dev is not allowed/],
  ["ext4", "-O +journal_dev", /-O journal_dev is not allowed/],
  ["ext4", "-O has_journal,-journal_dev", /-O journal_dev is not allowed/],
  ["ext4", "-O FEATURE_I3", /-O FEATURE_I3 is not allowed/],
  ["ext4", "-O ++journal_dev", /-O \+journal_dev is not allowed/],
  ["ext4", "-J +device=x", /-J \+device is not allowed/],
  ["ext4", "-E test_fs", /-E test_fs is not allowed, it takes stride, /],
  ["ext4", "-E +offset=1", /-E \+offset is not allowed/],
  ["ext4", "-e panic", /-e panic is not allowed, it takes continue, remount-ro/],
  ["ext4", "-O bogus", /-O bogus is not allowed, it takes none, has_journal, /],
  ["xfs", "-m bogus=1", /-m bogus is not allowed, it takes autofsck, bigtime/],
  ["xfs", "-d rtinherit=1", /-d rtinherit is not allowed/],
  ["btrfs", "-O list-all", /-O list-all is not allowed/],
  ["btrfs", "-O zoned", /-O zoned is not allowed/],
  ["ext4", "-L $(reboot)", /has something else than letters/],
  ["ext4", "-L a/b", /has something else than letters/],
  ["ext4", "--help", /--help is not one of/],
  ["ext4", "--", /-- is not one of/],
  ["ext4", "-", /- is not one of/],
  ["ext4", "-constructor x", /-c is not one of/],
  ["xfs", "-f", /-f is not one of/],
  ["xfs", "-N", /-N is not one of/],
  ["xfs", "-p /etc/passwd", /-p is not one of/],
  ["xfs", "-r rtdev=/dev/sda", /-r is not one of/],
  ["xfs", "-c options=/etc/x", /-c is not one of/],
  ["xfs", "-d name=sda", /-d name is not allowed/],
  ["xfs", "-d file,size=1g", /-d file is not allowed/],
  ["xfs", "-l logdev=sda", /-l logdev is not allowed/],
  ["xfs", "-m uuid=x", /-m uuid is not allowed/],
  ["btrfs", "-f", /-f is not one of/],
  ["btrfs", "--force", /--force is not one of/],
  ["btrfs", "-r /etc", /-r is not one of/],
  ["btrfs", "--rootdir=/etc", /--rootdir is not one of/],
  ["btrfs", "-b 1g", /-b is not one of/],
  ["btrfs", "-Mf", /-M is not one of/],
];

for (const [fsType, text, message] of badOptions) {
  Deno.test(`parseMkfsOptions refuses "${text}" for ${fsType}`, () => {
    assert.throws(() => parseMkfsOptions(fsType, text), (error) => {
      assert(error instanceof StatusError);
      assert.equal(error.code, "INVALID_ARGUMENT");
      // A combined flag is looked up by its first letter.
      assert.match(error.message, text === "-Mf" ? /-M is not one of|-Mf is not one of/ : message);
      return true;
    });
  });
}

Deno.test("every file system has its own list of mkfs options", () => {
  for (const fsType of fsTypes) assert.deepEqual(parseMkfsOptions(fsType, "-L name"), ["-L", "name"]);
});
