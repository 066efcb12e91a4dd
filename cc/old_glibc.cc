// SPDX-License-Identifier: Apache-2.0
//
// Lets libraries run with C and C++ libraries that are older than those they
// are built with, on x86-64: a wheel is for glibc 2.27 and the libstdc++ of
// GCC 7 and newer, as TensorFlow's own. These are all symbols in it that are
// newer than that. Linked into every library of a wheel (LBE_OLD_GLIBC in
// CMakeLists.txt). With --wrap=name, which CMakeLists.txt makes of every line
// of this file that begins with LBE_OLD or LBE_NEW, the linker takes
// __wrap_name for what is called `name`.

#include <new>
#include <sstream>

// A function that is there by an older version of its symbol, too, and does the
// same.
#define LBE_OLD(name, version)                                \
  asm(".text\n.symver lbe_old_" #name ", " #name "@" #version \
      "\n.globl __wrap_" #name "\n.hidden __wrap_" #name      \
      "\n.type __wrap_" #name                                 \
      ", @function"                                           \
      "\n__wrap_" #name ": jmp lbe_old_" #name "@PLT");

// A function that is not there; what it does follows.
#define LBE_NEW(name) \
  extern "C" __attribute__((visibility("hidden"))) void __wrap_##name

// glibc 2.29, without the error handling of old standards; the values are the
// same.
LBE_OLD(log, GLIBC_2.2.5)

// glibc 2.34, where these came from other libraries. Most are called by the
// CUDA runtime.
LBE_OLD(dlclose, GLIBC_2.2.5)
LBE_OLD(dlerror, GLIBC_2.2.5)
LBE_OLD(dlmopen, GLIBC_2.3.4)
LBE_OLD(dlopen, GLIBC_2.2.5)
LBE_OLD(dlsym, GLIBC_2.2.5)
LBE_OLD(dlvsym, GLIBC_2.2.5)
LBE_OLD(pthread_condattr_setpshared, GLIBC_2.2.5)
LBE_OLD(pthread_create, GLIBC_2.2.5)
LBE_OLD(pthread_detach, GLIBC_2.2.5)
LBE_OLD(pthread_getspecific, GLIBC_2.2.5)
LBE_OLD(pthread_join, GLIBC_2.2.5)
LBE_OLD(pthread_key_create, GLIBC_2.2.5)
LBE_OLD(pthread_key_delete, GLIBC_2.2.5)
LBE_OLD(pthread_kill, GLIBC_2.2.5)
LBE_OLD(pthread_mutex_trylock, GLIBC_2.2.5)
LBE_OLD(pthread_mutexattr_destroy, GLIBC_2.2.5)
LBE_OLD(pthread_mutexattr_init, GLIBC_2.2.5)
LBE_OLD(pthread_mutexattr_setpshared, GLIBC_2.2.5)
LBE_OLD(pthread_mutexattr_settype, GLIBC_2.2.5)
LBE_OLD(pthread_once, GLIBC_2.2.5)
LBE_OLD(pthread_rwlock_destroy, GLIBC_2.2.5)
LBE_OLD(pthread_rwlock_init, GLIBC_2.2.5)
LBE_OLD(pthread_rwlock_rdlock, GLIBC_2.2.5)
LBE_OLD(pthread_rwlock_timedrdlock, GLIBC_2.2.5)
LBE_OLD(pthread_rwlock_timedwrlock, GLIBC_2.2.5)
LBE_OLD(pthread_rwlock_tryrdlock, GLIBC_2.2.5)
LBE_OLD(pthread_rwlock_trywrlock, GLIBC_2.2.5)
LBE_OLD(pthread_rwlock_unlock, GLIBC_2.2.5)
LBE_OLD(pthread_rwlock_wrlock, GLIBC_2.2.5)
LBE_OLD(pthread_rwlockattr_destroy, GLIBC_2.2.5)
LBE_OLD(pthread_rwlockattr_init, GLIBC_2.2.5)
LBE_OLD(pthread_rwlockattr_setpshared, GLIBC_2.2.5)
LBE_OLD(pthread_setspecific, GLIBC_2.2.5)
LBE_OLD(pthread_spin_destroy, GLIBC_2.2.5)
LBE_OLD(pthread_spin_init, GLIBC_2.2.5)
LBE_OLD(pthread_spin_lock, GLIBC_2.2.5)
LBE_OLD(pthread_spin_trylock, GLIBC_2.2.5)
LBE_OLD(pthread_spin_unlock, GLIBC_2.2.5)
LBE_OLD(sem_destroy, GLIBC_2.2.5)
LBE_OLD(sem_init, GLIBC_2.2.5)
LBE_OLD(sem_post, GLIBC_2.2.5)
LBE_OLD(sem_timedwait, GLIBC_2.2.5)
LBE_OLD(sem_trywait, GLIBC_2.2.5)
LBE_OLD(sem_wait, GLIBC_2.2.5)
LBE_OLD(shm_open, GLIBC_2.2.5)
LBE_OLD(shm_unlink, GLIBC_2.2.5)

// GCC 12, which made it noexcept.
LBE_OLD(_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE,
        GLIBCXX_3.4.11)

// GCC 11, which counts the references to an exception in place. Before, the
// constructor that copies and the destructor did.
extern "C" void copy_exception(void* self, const void* other) asm(
    "_ZNSt15__exception_ptr13exception_ptrC1ERKS0_");
extern "C" void destroy_exception(void* self) asm(
    "_ZNSt15__exception_ptr13exception_ptrD1Ev");
LBE_NEW(_ZNSt15__exception_ptr13exception_ptr9_M_addrefEv)(void** self) {
  void* copy;
  copy_exception(&copy, self);
}
LBE_NEW(_ZNSt15__exception_ptr13exception_ptr10_M_releaseEv)(void** self) {
  destroy_exception(self);
  *self = nullptr;
}

// GCC 9: the default constructor of a stringstream.
LBE_NEW(_ZNSt7__cxx1118basic_stringstreamIcSt11char_traitsIcESaIcEEC1Ev)(
    std::stringstream* self) {
  new (self) std::stringstream(std::ios_base::in | std::ios_base::out);
}

// glibc 2.32: whether reference counts need no atomic operations.
extern "C" {
char __libc_single_threaded = 0;
asm(".hidden __libc_single_threaded");
}

// GCC 11: what is called where an array would be too large.
namespace std {
void __throw_bad_array_new_length() { throw bad_array_new_length(); }
asm(".hidden _ZSt28__throw_bad_array_new_lengthv");
}  // namespace std
