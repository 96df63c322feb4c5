/* SPDX-License-Identifier: (GPL-2.0-only OR BSD-2-Clause) */
/*
 * Every map. All are pinned under their name and the hash of their layout.
 * The sizes here are defaults: the loader's settings replace them. Not preallocated where the type
 * allows it (the LRU maps are): an empty map costs next to nothing.
 */
#pragma once

#include <bpf/bpf_helpers.h>
#include <linux/bpf.h>

#include "mesh_types.h"

/*
 * Writer: map_writer. Reader: connect, sendmsg. Full: the service is refused by name, and connections
 * to its address by REASON_NO_ROOM.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 131072);
	__type(key, struct service_key);
	__type(value, struct service_value);
} services SEC(".maps");

/*
 * Writer: map_writer. Reader: connect, sendmsg. Full: the endpoint is refused by name, and connections
 * to a service that has none here by REASON_NO_ROOM.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 524288);
	__type(key, struct endpoint_key);
	__type(value, struct endpoint_value);
} endpoints SEC(".maps");

/* Writer: map_writer. Reader: connect, sendmsg, after a miss in `services`. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 524288);
	__type(key, struct address_key);
	__type(value, struct address_value);
} addresses SEC(".maps");

/* Writer: map_writer. Reader: connect, sendmsg, after a miss in `services`. Full: refused by name. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, struct range_key);
	__type(value, struct range_value);
} ranges SEC(".maps");

/* Index: enum switch_index. Writer: map_writer. Reader: connect, sendmsg. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, SWITCH_COUNT);
	__type(key, __u32);
	__type(value, __u32);
} switches SEC(".maps");

/* Writer: bpf_loader. Reader: connect, sendmsg, telemetry. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct pod_key);
	__type(value, struct pod_value);
} pods SEC(".maps");

/* Writer and reader: sendmsg, recvmsg. Evicts the least recently used; the socket then chooses anew. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct datagram_key);
	__type(value, struct datagram_value);
} datagrams SEC(".maps");

/* Writer and reader: connect, sendmsg. Evicts the least recently used: that client draws anew. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct affinity_key);
	__type(value, struct affinity_value);
} affinities SEC(".maps");

/*
 * Open TCP connections of this node to endpoints of services that are balanced by them. Writer:
 * sockops. Reader: connect. Evicts the least recently used: that endpoint counts from 0 again.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 16384);
	__type(key, struct peer_key);
	__type(value, __s64);
} loads SEC(".maps");

/*
 * Endpoints that refused a connection, and until when others are drawn for them. Writer: sockops.
 * Reader: connect. Evicts the least recently used: that endpoint is drawn as before.
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct peer_key);
	__type(value, __u64);
} shunned SEC(".maps");

/* Who enrolled pods are. Writer: map_writer. Reader: sockops. A pod that has none is nobody to waypoints. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct pod_key);
	__type(value, struct identity_value);
} identities SEC(".maps");

/* What identities are hashed with: random, as long as the map lives. Writer and reader: map_writer. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct identity_secret);
} identity_secrets SEC(".maps");

/* Made of the one before. Writer: map_writer. Reader: sockops. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct service_secret);
} service_secrets SEC(".maps");

/* What waypoints of other nodes are told is sealed with. Writer: map_writer. Reader: sockops. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, struct handoff_secret);
} handoff_secrets SEC(".maps");

/*
 * Connections on their way to a waypoint of this node. Writer: sockops, of a client here before the SYN
 * leaves, of one elsewhere when it is established. Reader and remover: getsockopt, when it is accepted.
 * Evicts the least recently used: the waypoint closes that one (REASON_HANDOFF_UNKNOWN).
 */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 65536);
	__type(key, struct handoff_key);
	__type(value, struct handoff_value);
} handoffs SEC(".maps");

/* Writer: the loader. Reader: sk_lookup, for what begins in the network namespace of waypoints. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 4096);
	__type(key, struct front_key);
	__type(value, struct front_value);
} fronts SEC(".maps");

/*
 * How often maps were put in the place of another release's. Writer: bpf_loader. Reader: who writes other
 * maps, to find whether these are still the ones that programs read (pykmesh/kernel/upgrade.py). Its layout
 * is for ever.
 */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, __u32);
	__type(value, __u64);
} generations SEC(".maps");

/* Listening sockets of waypoints' instances, by port. The kernel takes a socket out when it is closed. */
struct {
	__uint(type, BPF_MAP_TYPE_SOCKHASH);
	__uint(max_entries, 4096);
	__type(key, __u32);
	__type(value, __u64);
} listeners SEC(".maps");

/* What the SYN of a connection to a waypoint of another node says. Writer and reader: sockops. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct handoff_option);
} claims SEC(".maps");

/* Writer: dns_proxy. Reader: connect, sendmsg, recvmsg, getpeername. Full: that pod asks past the proxy. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, struct dns_key);
	__type(value, struct dns_listener);
} dns_listeners SEC(".maps");

/* Writer: connect, sendmsg. Reader: these, recvmsg, getpeername; dns_proxy, which frees what rests. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 16384);
	__type(key, struct dns_key);
	__type(value, struct dns_server);
} dns_servers SEC(".maps");

/* Writer: the programs. Reader and remover of what rests: telemetry. Full: counted as open_lost. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, 131072);
	__type(key, struct open_key);
	__type(value, __u64);
} opens SEC(".maps");

/* Writer: the programs. Reader: telemetry. Full: counted as record_lost. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 16 * 1024 * 1024);
} flows SEC(".maps");

/* Index: enum reason. Writer: the programs. Reader: telemetry, the command line. */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, REASON_COUNT);
	__type(key, __u32);
	__type(value, __u64);
} counters SEC(".maps");

/* An entry is freed with its socket; the programs of the next loader find what those before have noted. */
struct {
	__uint(type, BPF_MAP_TYPE_SK_STORAGE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__type(key, int);
	__type(value, struct socket_state);
} sockets SEC(".maps");
